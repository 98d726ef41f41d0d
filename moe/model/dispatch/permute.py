"""The one data movement of every dispatcher: a gather whose gradient is a gather too.

A scatter-add is slow on GPUs and on CPUs alike. Whoever builds a permutation knows its inverse, so both are passed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.ops.varying import align


class Permutation(NamedTuple):
  """A partial map of rows, with its inverse.

  source_Y: row of the input that output row y copies, where valid_Y; else the output row is 0.
  inverse_XK: output rows that copy input row x, where used_XK; no output row is listed twice.
  """

  source_Y: jax.Array
  valid_Y: jax.Array
  inverse_XK: jax.Array
  used_XK: jax.Array


def permute(x_XD: jax.Array, permutation: Permutation) -> jax.Array:
  """y_YD with y[r] = x[source[r]] where valid, else 0."""
  x_XD, permutation = align(x_XD, permutation)
  return _permute(x_XD, permutation)


@jax.custom_vjp
def _permute(x_XD, permutation):
  return _gather(x_XD, permutation.source_Y, permutation.valid_Y)


def _forward(x_XD, permutation):
  return _permute(x_XD, permutation), permutation


def _backward(permutation, dy_YD):
  # One gather per copy: K rows of float32 at a time instead of a [X, K, D] array.
  copies = [
    _gather(dy_YD, permutation.inverse_XK[:, k], permutation.used_XK[:, k]).astype(jnp.float32)
    for k in range(permutation.inverse_XK.shape[1])
  ]
  return sum(copies[1:], copies[0]).astype(dy_YD.dtype), None


_permute.defvjp(_forward, _backward)


def _gather(x, index, valid):
  return jnp.where(valid[:, None], x.at[index].get(mode='clip'), 0)


class Sorted(NamedTuple):
  """Assignments in the order of their keys.

  order_M: assignment that row r holds.
  place_M: row that assignment a sits in (the inverse of order_M).
  size: int32 rows per key; start: int32 first row of each key.
  """

  order_M: jax.Array
  place_M: jax.Array
  size: jax.Array
  start: jax.Array


def sort_by_key(key_M: jax.Array, num_keys: int) -> Sorted:
  """Stable sort of keys 0..num_keys; key num_keys means 'nowhere' and comes last, outside `size`."""
  order_M = jnp.argsort(key_M, stable=True)
  place_M = jnp.argsort(order_M)
  end = jnp.searchsorted(key_M[order_M], jnp.arange(num_keys), side='right').astype(jnp.int32)
  start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
  return Sorted(order_M, place_M, end - start, start)


def weighted_sum(rows_AD: jax.Array, weight_TK: jax.Array) -> jax.Array:
  """y_TD = sum over K of weight * row, in float32, in the rows' dtype. Rows come as A = T * K in assignment order."""
  rows_TKD = rows_AD.reshape(*weight_TK.shape, rows_AD.shape[-1]).astype(jnp.float32)
  return (rows_TKD * weight_TK[:, :, None]).sum(1).astype(rows_AD.dtype)
