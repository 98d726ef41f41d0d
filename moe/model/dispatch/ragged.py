"""Exchange just the rows there are, with `jax.lax.ragged_all_to_all`. XLA:CPU does not implement it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.routing import Routing
from moe.model.dispatch._contract import expert_axis, in_two_steps
from moe.model.dispatch._wire import from_experts, in_fp8, to_experts
from moe.model.dispatch.all_to_all import buffer_rows, exchange_counts, regroup_by_expert, swap
from moe.ops.permute import Layout, Permutation, combine_rows, permute
from moe.ops.varying import align
from moe.parallel.resolved import Resolved


class Offsets(NamedTuple):
  """Per peer: where its rows start here, how many go to it, where they start there, how many come from it."""

  here_s: jax.Array
  send_s: jax.Array
  there_s: jax.Array
  receive_s: jax.Array


class Plan(NamedTuple):
  regroup_back: Permutation
  routes: tuple[Offsets, Offsets]  # to the experts, and home
  back: Permutation
  weight_TK: jax.Array


def dispatch(x_TD: jax.Array, routing: Routing, resolved: Resolved):
  """(x_MD, size_e, plan). M = shards * the rows one shard can send another at most, padded."""
  axis, (T, K) = expert_axis(resolved), routing.expert_TK.shape
  shards, swapped = lax.axis_size(axis), functools.partial(swap, axis=axis)
  by, sent_de, received_se = exchange_counts(routing, resolved)
  send_s, receive_s = sent_de.sum(1), received_se.sum(1)
  out_start_s, in_start_s = jnp.cumsum(send_s) - send_s, jnp.cumsum(receive_s) - receive_s
  away = Offsets(out_start_s, send_s, swapped(in_start_s), receive_s)
  home = Offsets(in_start_s, receive_s, swapped(out_start_s), send_s)
  valid_A = jnp.arange(T * K) < by.size.sum()
  out, way_back = Layout(by.order_M, valid_A, by.place_M, by.size).permutations(routing.keep_TK)
  rows = shards * buffer_rows(T, resolved, shards)
  there, back = _ways(rows, T * K, axis)
  rows_MD = to_experts(there, back, permute(x_TD, out), (away, home), in_fp8(resolved))
  end_se = jnp.cumsum(received_se, axis=1)
  regroup, regroup_back, size_e = regroup_by_expert(in_start_s, end_se, rows, resolved.row_multiple)
  return permute(rows_MD, regroup), size_e, Plan(regroup_back, (away, home), way_back, routing.weight_TK)


def combine(y_MD: jax.Array, plan: Plan, resolved: Resolved) -> jax.Array:
  """The gate-weighted sum of each token's rows, which come home first."""
  rows_MD = permute(y_MD, plan.regroup_back)
  back, there = _ways(len(rows_MD), plan.weight_TK.size, expert_axis(resolved))
  return combine_rows(from_experts(there, back, rows_MD, plan.routes, in_fp8(resolved)), plan.back, plan.weight_TK)


def _ways(rows: int, assignments: int, axis: str):
  """The exchanges of (rows, routes) to the experts and home, the transposes of one another."""
  exchange = functools.partial(_exchange, axis=axis)
  return functools.partial(exchange, to=0, rows=rows), functools.partial(exchange, to=1, rows=assignments)


def _exchange(rows_MD, routes, to: int, rows: int, axis: str):
  """`rows` rows that arrive by routes[to]; those that none reaches are 0."""
  offsets = routes[to]
  rows_MD, empty, offsets = align(rows_MD, jnp.zeros((rows, rows_MD.shape[1]), rows_MD.dtype), offsets)
  return lax.ragged_all_to_all(
    rows_MD, empty, offsets.here_s, offsets.send_s, offsets.there_s, offsets.receive_s, axis_name=axis
  )


apply = in_two_steps(dispatch, combine)
