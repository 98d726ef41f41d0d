"""Gather all tokens over the expert axis, compute the assignments of this shard's experts, reduce-scatter the sums.

Always dropless and free of padding on the wire; moves every token to every shard, so it suits small expert axes or
many experts per token (8 of 256 on 8 shards send most tokens nearly everywhere anyhow).
"""

import functools

import jax
from jax import lax

from moe.balance.routing import Routing
from moe.model.dispatch import local
from moe.model.dispatch._contract import expert_axis, in_two_steps
from moe.model.dispatch._wire import from_experts, in_fp8, to_experts
from moe.ops.permute import permute
from moe.parallel.resolved import Resolved


def dispatch(x_TD: jax.Array, routing: Routing, resolved: Resolved):
  """(x_MD, size_e, plan). M = shards * T * min(K, experts per shard), padded."""
  axis, model = expert_axis(resolved), resolved.model
  gather, scatter = _ways(axis)
  held = model.num_experts // lax.axis_size(axis)
  expert_TK = gather(routing.expert_TK) - lax.axis_index(axis) * held
  keep_TK = gather(routing.keep_TK) & (expert_TK >= 0) & (expert_TK < held)
  rows = expert_TK.shape[0] * min(model.top_k, held)
  out, back, size_e = local.expert_order(expert_TK, keep_TK, held, rows, resolved.row_multiple)
  x_TD = to_experts(gather, scatter, x_TD, in_fp8=in_fp8(resolved))
  return permute(x_TD, out), size_e, local.Plan(back, gather(routing.weight_TK))


def combine(y_MD: jax.Array, plan: local.Plan, resolved: Resolved) -> jax.Array:
  """The gate-weighted sum of each token's rows, of all shards."""
  gather, scatter = _ways(expert_axis(resolved))
  return from_experts(scatter, gather, local.combine(y_MD, plan, resolved), in_fp8=in_fp8(resolved))


def _ways(axis: str):
  """To the experts and home, the transposes of one another."""
  return functools.partial(_gather, axis=axis), functools.partial(_scatter, axis=axis)


def _gather(a, operands=(), axis=''):
  return lax.all_gather(a, axis, axis=0, tiled=True)


def _scatter(a, operands=(), axis=''):
  return lax.psum_scatter(a, axis, scatter_dimension=0, tiled=True)


apply = in_two_steps(dispatch, combine)
