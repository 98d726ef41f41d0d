"""sign(mean(c) - c) (arXiv 2408.15664, algorithm 1; arXiv 2412.19437, section 2.1.2)."""

import jax.numpy as jnp

from moe.balance.rules import Direction, gap


class Sign(Direction):
  def direction(self, load_LE):
    return jnp.sign(gap(load_LE))


RULE = Sign()
