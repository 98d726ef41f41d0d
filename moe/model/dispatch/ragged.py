"""Exchange just the rows there are, with `jax.lax.ragged_all_to_all`. XLA:CPU does not implement it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.config import ModelConfig
from moe.model.dispatch.all_to_all import buffer_rows, exchange_counts, regroup_by_expert
from moe.model.router import Routing
from moe.ops.permute import Layout, Permutation, combine_rows, permute
from moe.ops.varying import align


class Offsets(NamedTuple):
  """Per peer: where its rows start here, how many go to it, where they start there, how many come from it."""

  here_s: jax.Array
  send_s: jax.Array
  there_s: jax.Array
  receive_s: jax.Array


class Plan(NamedTuple):
  regroup_back: Permutation
  home: Offsets
  back: Permutation
  weight_TK: jax.Array


def dispatch(x_TD: jax.Array, routing: Routing, config: ModelConfig, dropless: bool = False, row_multiple: int = 1):
  """See `moe.model.dispatch`. M = shards * the rows one shard can send another at most, padded."""
  shards, (T, K) = lax.axis_size('expert'), routing.expert_TK.shape
  by, sent_de, received_se = exchange_counts(routing, config)
  send_s, receive_s = sent_de.sum(1), received_se.sum(1)
  out_start_s, in_start_s = jnp.cumsum(send_s) - send_s, jnp.cumsum(receive_s) - receive_s
  swap = lambda a: lax.all_to_all(a, 'expert', split_axis=0, concat_axis=0, tiled=True)
  away = Offsets(out_start_s, send_s, swap(in_start_s), receive_s)
  home = Offsets(in_start_s, receive_s, swap(out_start_s), send_s)
  valid_A = jnp.arange(T * K) < by.size.sum()
  out, back = Layout(by.order_M, valid_A, by.place_M, by.size).permutations(routing.keep_TK)
  rows = shards * buffer_rows(T, config, shards, dropless)
  rows_MD = _exchange(permute(x_TD, out), away, rows)
  regroup, regroup_back, size_e = regroup_by_expert(in_start_s, jnp.cumsum(received_se, axis=1), rows, row_multiple)
  return permute(rows_MD, regroup), size_e, Plan(regroup_back, home, back, routing.weight_TK)


def combine(y_MD: jax.Array, plan: Plan) -> jax.Array:
  """See `moe.model.dispatch`."""
  rows_AD = _exchange(permute(y_MD, plan.regroup_back), plan.home, plan.weight_TK.size)
  return combine_rows(rows_AD, plan.back, plan.weight_TK)


def _exchange(rows_MD, offsets: Offsets, rows: int):
  rows_MD, empty, offsets = align(rows_MD, jnp.zeros((rows, rows_MD.shape[1]), rows_MD.dtype), offsets)
  return lax.ragged_all_to_all(
    rows_MD, empty, offsets.here_s, offsets.send_s, offsets.there_s, offsets.receive_s, axis_name='expert'
  )
