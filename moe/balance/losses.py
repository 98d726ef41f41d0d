"""Auxiliary losses, per router and weighted by tokens, from the statistics of one microbatch.

Each returns this shard's part of the loss: summed over mesh and microbatches it is the mean over all tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.stats import RouterStats
from moe.parallel.resolved import Resolved


def auxiliary(stats: RouterStats, tokens_L: jax.Array, earlier_load_LE: jax.Array, config: Resolved):
  """The configured auxiliary loss and z-loss, both already weighted, as scalars.

  Args:
    stats: of this shard and microbatch, stacked over routers.
    tokens_L: float32 unmasked tokens per router in the whole batch (all shards and microbatches).
    earlier_load_LE: int32 loads of the step's earlier microbatches on this shard, for the global-batch scope.
    config: balance.aux_loss, aux_alpha, aux_scope, z_loss and the model's num_experts and top_k.
  """
  balance = config.balance
  z = balance.z_loss * (stats.z_sum / tokens_L).sum()
  if balance.aux_loss == 'none':
    return jnp.zeros_like(z), z
  if balance.aux_loss == 'sequence':
    per_token_L = stats.sequence_sum / tokens_L
  else:
    per_token_L = _switch_sum(stats, earlier_load_LE, config) / tokens_L
  return balance.aux_alpha * per_token_L.sum(), z


def _switch_sum(stats: RouterStats, earlier_load_LE, config: Resolved):
  """Sum over this shard's tokens of E sum_i f_i p_i (arXiv 2101.03961), f_i the fraction of assignments to expert i.

  f counts the tokens of the whole mesh: in this microbatch, or also in the step's earlier ones (global batch, arXiv
  2501.11873), which is as much of the batch as is known when this microbatch's gradient is taken.
  """
  load_LE = stats.load_E
  if config.balance.aux_scope == 'global_batch':
    load_LE = load_LE + earlier_load_LE
  load_LE = lax.psum(load_LE, config.axes.batch).astype(jnp.float32)
  fraction_LE = load_LE / jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  return config.model.num_experts * (fraction_LE * stats.prob_sum_E).sum(-1)
