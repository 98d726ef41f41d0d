"""The bias stays as it is."""

from moe.balance.rules import Rule


class Still(Rule):
  def update(self, state, load_LE, statistic, gamma, balance):
    return state


RULE = Still()
