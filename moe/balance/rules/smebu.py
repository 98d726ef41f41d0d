"""Soft-clamped momentum update (arXiv 2602.17004): m = beta m + (1 - beta) centred(u tanh(kappa v)); b += m."""

import jax.numpy as jnp

from moe.balance.rules import Rule, centered, gap, mean


class Smebu(Rule):
  def start(self, bias_LE):
    return {'bias_LE': bias_LE, 'momentum_LE': jnp.zeros_like(bias_LE)}

  def update(self, state, load_LE, statistic, gamma, balance):
    violation_LE = gap(load_LE) / jnp.maximum(mean(load_LE), 1)
    step_LE = centered(gamma * jnp.tanh(balance.smebu_kappa * violation_LE))
    momentum_LE = balance.smebu_beta * state['momentum_LE'] + (1 - balance.smebu_beta) * step_LE
    momentum_LE = jnp.where(gamma > 0, momentum_LE, state['momentum_LE'])
    return {'bias_LE': state['bias_LE'] + jnp.where(gamma > 0, momentum_LE, 0), 'momentum_LE': momentum_LE}


RULE = Smebu()
