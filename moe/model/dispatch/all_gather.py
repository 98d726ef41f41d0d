"""Gather all tokens over the expert axis, compute the assignments of this shard's experts, reduce-scatter the sums.

Always dropless and free of padding on the wire; moves every token to every shard, so it suits small expert axes or
many experts per token (8 of 256 on 8 shards send most tokens nearly everywhere anyhow).
"""

import jax
from jax import lax

from moe.config import ModelConfig
from moe.model.dispatch import local
from moe.model.router import Routing
from moe.ops.permute import permute


def dispatch(x_TD: jax.Array, routing: Routing, config: ModelConfig, dropless: bool = False, row_multiple: int = 1):
  """See `moe.model.dispatch`. M = shards * T * min(K, experts per shard), padded."""
  gather = lambda a: lax.all_gather(a, 'expert', axis=0, tiled=True)
  held = config.num_experts // lax.axis_size('expert')
  expert_TK = gather(routing.expert_TK) - lax.axis_index('expert') * held
  keep_TK = gather(routing.keep_TK) & (expert_TK >= 0) & (expert_TK < held)
  rows = expert_TK.shape[0] * min(config.top_k, held)
  out, back, size_e = local.expert_order(expert_TK, keep_TK, held, rows, row_multiple)
  return permute(gather(x_TD), out), size_e, local.Plan(back, gather(routing.weight_TK))


def combine(y_MD: jax.Array, plan: local.Plan) -> jax.Array:
  """See `moe.model.dispatch`."""
  return lax.psum_scatter(local.combine(y_MD, plan), 'expert', scatter_dimension=0, tiled=True)
