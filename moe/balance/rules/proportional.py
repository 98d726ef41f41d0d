"""(mean(c) - c) / mean(c) (arXiv 2512.03915)."""

import jax.numpy as jnp

from moe.balance.rules import Direction, gap, mean


class Proportional(Direction):
  def direction(self, load_LE):
    return gap(load_LE) / jnp.maximum(mean(load_LE), 1)


RULE = Proportional()
