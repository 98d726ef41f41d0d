"""Gather all tokens over the expert axis, compute the assignments of this shard's experts, reduce-scatter the sums.

Always dropless and free of padding on the wire; moves every token to every shard, so it suits small expert axes or
many experts per token (8 of 256 on 8 shards send most tokens nearly everywhere anyhow).
"""

import jax
from jax import lax

from moe.balance.routing import Routing
from moe.config import ModelConfig
from moe.model.dispatch import local
from moe.model.dispatch.wire import from_experts, to_experts
from moe.ops.permute import permute


def dispatch(
  x_TD: jax.Array,
  routing: Routing,
  config: ModelConfig,
  dropless: bool = False,
  row_multiple: int = 1,
  in_fp8: bool = False,
):
  """See `moe.model.dispatch`. M = shards * T * min(K, experts per shard), padded."""
  held = config.num_experts // lax.axis_size('expert')
  expert_TK = _gather(routing.expert_TK) - lax.axis_index('expert') * held
  keep_TK = _gather(routing.keep_TK) & (expert_TK >= 0) & (expert_TK < held)
  rows = expert_TK.shape[0] * min(config.top_k, held)
  out, back, size_e = local.expert_order(expert_TK, keep_TK, held, rows, row_multiple)
  x_TD = to_experts(_gather, _scatter, x_TD, in_fp8=in_fp8)
  return permute(x_TD, out), size_e, local.Plan(back, _gather(routing.weight_TK))


def combine(y_MD: jax.Array, plan: local.Plan, in_fp8: bool = False) -> jax.Array:
  """See `moe.model.dispatch`."""
  return from_experts(_scatter, _gather, local.combine(y_MD, plan), in_fp8=in_fp8)


def _gather(a, operands=()):
  return lax.all_gather(a, 'expert', axis=0, tiled=True)


def _scatter(a, operands=()):
  return lax.psum_scatter(a, 'expert', scatter_dimension=0, tiled=True)
