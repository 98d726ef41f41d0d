"""(mean(c) - c) / RMS over experts of it: the proportional direction with the sign rule's step length."""

import jax.numpy as jnp

from moe.balance.rules import Direction, gap


class Rms(Direction):
  def direction(self, load_LE):
    gap_LE = gap(load_LE)
    return gap_LE / jnp.sqrt(jnp.maximum(jnp.mean(gap_LE * gap_LE, -1, keepdims=True), 1e-12))


RULE = Rms()
