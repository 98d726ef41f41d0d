"""Exchange rows in padded buffers, one per destination shard, with `jax.lax.all_to_all`.

A buffer holds what one shard can send another at most: experts per shard * capacity when dropping, else
T * min(K, experts per shard).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.routing import Routing
from moe.model.dispatch._contract import expert_axis, in_two_steps
from moe.model.dispatch._wire import from_experts, in_fp8, to_experts
from moe.model.router import capacity
from moe.ops.permute import Permutation, Sorted, combine_rows, key_of, lay_out, permute, sort_by_key
from moe.parallel.resolved import Resolved


class Plan(NamedTuple):
  regroup_back: Permutation
  unpack: Permutation
  weight_TK: jax.Array


def dispatch(x_TD: jax.Array, routing: Routing, resolved: Resolved):
  """(x_MD, size_e, plan). M = shards * buffer, padded."""
  axis = expert_axis(resolved)
  shards, swapped = lax.axis_size(axis), functools.partial(swap, axis=axis)
  by, sent_de, received_se = exchange_counts(routing, resolved)
  buffer = buffer_rows(len(x_TD), resolved, shards)
  out, unpack = _pack(by, sent_de.sum(1), routing, buffer)
  rows_MD = to_experts(swapped, swapped, permute(x_TD, out), in_fp8=in_fp8(resolved))
  start_s, end_se = jnp.arange(shards) * buffer, jnp.cumsum(received_se, axis=1)
  regroup, regroup_back, size_e = regroup_by_expert(start_s, end_se, shards * buffer, resolved.row_multiple)
  return permute(rows_MD, regroup), size_e, Plan(regroup_back, unpack, routing.weight_TK)


def combine(y_MD: jax.Array, plan: Plan, resolved: Resolved) -> jax.Array:
  """The gate-weighted sum of each token's rows, which come home first."""
  swapped = functools.partial(swap, axis=expert_axis(resolved))
  rows_MD = from_experts(swapped, swapped, permute(y_MD, plan.regroup_back), in_fp8=in_fp8(resolved))
  return combine_rows(rows_MD, plan.unpack, plan.weight_TK)


def swap(a: jax.Array, operands=(), axis: str = '') -> jax.Array:
  """Part s of the first axis goes to shard s; its own transpose."""
  return lax.all_to_all(a, axis, split_axis=0, concat_axis=0, tiled=True)


def buffer_rows(tokens: int, resolved: Resolved, shards: int) -> int:
  """Rows that one shard can send another at most."""
  model = resolved.model
  held = model.num_experts // shards
  if model.capacity_factor and not resolved.dropless:
    return held * capacity(tokens, model)
  return tokens * min(model.top_k, held)


def exchange_counts(routing: Routing, resolved: Resolved) -> tuple[Sorted, jax.Array, jax.Array]:
  """Assignments sorted by expert, rows sent per [destination, its expert] and received per [source, own expert]."""
  experts, axis = resolved.model.num_experts, expert_axis(resolved)
  by = sort_by_key(jnp.where(routing.keep_TK, routing.expert_TK, experts).reshape(-1), experts)
  sent_de = by.size.reshape(lax.axis_size(axis), -1)
  return by, sent_de, swap(sent_de, axis=axis)


def _pack(by: Sorted, sent_d, routing: Routing, buffer: int):
  """Permutations from tokens into the send buffers, and from the buffers that came back to assignments."""
  T, K = routing.expert_TK.shape
  start_d = jnp.cumsum(sent_d) - sent_d
  within_B = jnp.arange(buffer)
  row_M = (start_d[:, None] + within_B).reshape(-1)  # row of the sorted order that each slot takes
  valid_M = (within_B < sent_d[:, None]).reshape(-1)
  assignment_M = by.order_M.at[row_M].get(mode='clip')
  destination_A = routing.expert_TK.reshape(-1) // (by.size.size // sent_d.size)
  slot_A = destination_A * buffer + by.place_M - start_d[destination_A]
  out = Permutation(assignment_M // K, valid_M, slot_A.reshape(T, K), routing.keep_TK)
  unpack = Permutation(slot_A, routing.keep_TK.reshape(-1), assignment_M[:, None], valid_M[:, None])
  return out, unpack


def regroup_by_expert(start_s, end_se, rows: int, row_multiple: int):
  """Permutations from received rows, sorted by expert within each source, to the order of experts, and back.

  Args:
    start_s: first row of each source's part.
    end_se: end of each expert's rows within its source's part.
    rows: received rows, used or not.
    row_multiple: what every expert's rows are padded to.

  Returns:
    regroup: Permutation from `rows` rows to padded ones, regroup_back: the way back; size_e: rows per expert.
  """
  row_M = jnp.arange(rows)
  source_M = key_of(row_M, start_s) - 1
  # The expert is the number of experts of that source that end at or before the row; past all of them: nowhere.
  key_M = (end_se[source_M] <= (row_M - start_s[source_M])[:, None]).sum(1)
  layout = lay_out(key_M, end_se.shape[1], rows, row_multiple)
  return *layout.permutations((key_M < end_se.shape[1])[:, None]), layout.size


apply = in_two_steps(dispatch, combine)
