"""Moves as the sign rule does; the bias starts at 1 and multiplies the scores (arXiv 2408.15664, table 4)."""

from moe.balance.rules.sign import Sign


class Multiplicative(Sign):
  factor = True


RULE = Multiplicative()
