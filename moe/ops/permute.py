"""The one data movement of dispatchers and grouped matmuls: a gather whose gradient is a gather too.

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
  end = (key_M <= jnp.arange(num_keys)[:, None]).sum(1, dtype=jnp.int32)
  start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
  return Sorted(order_M, place_M, end - start, start)


def key_of(row_M: jax.Array, end: jax.Array) -> jax.Array:
  """int32 key of each row, from where each key's rows end; the number of keys for rows past them all.

  By comparing with all: a binary search is a loop, and costs a GPU a launch per step.
  """
  return (row_M[:, None] >= end).sum(1, dtype=jnp.int32)


class Layout(NamedTuple):
  """Sorted assignments with room after each key's rows, so that all keys start at a multiple of some number of rows.

  order_M: assignment that row r holds, where valid_M.
  place_A: row that assignment a sits in, if its key is not 'nowhere'.
  size: int32 rows per key, the room included.
  """

  order_M: jax.Array
  valid_M: jax.Array
  place_A: jax.Array
  size: jax.Array

  def permutations(self, used_TK: jax.Array) -> tuple[Permutation, Permutation]:
    """From T tokens to M rows, and from M rows to T * K assignments; `used_TK` says which have a row."""
    T, K = used_TK.shape
    out = Permutation(self.order_M // K, self.valid_M, self.place_A.reshape(T, K), used_TK)
    return out, Permutation(self.place_A, used_TK.reshape(-1), self.order_M[:, None], self.valid_M[:, None])


def lay_out(key_A: jax.Array, num_keys: int, rows: int, multiple: int = 1) -> Layout:
  """Sorts assignments by key 0..num_keys-1 (num_keys: nowhere) and pads each key's rows to a `multiple`.

  `rows` is the most assignments that go anywhere; M = padded_rows(rows, num_keys, multiple).

  Args:
    key_A: int32 key of each assignment, such as its expert.
    num_keys: one more than the largest key that goes somewhere.
    rows: the most assignments that do.
    multiple: what each key's rows are padded to.
  """
  by = sort_by_key(key_A, num_keys)
  size = -(-by.size // multiple) * multiple
  end = jnp.cumsum(size)
  start = end - size
  row_M = jnp.arange(padded_rows(rows, num_keys, multiple))
  key_M = jnp.minimum(key_of(row_M, end), num_keys - 1)
  inside_M = row_M - start[key_M]
  order_M = by.order_M.at[by.start[key_M] + inside_M].get(mode='clip')
  place_A = by.place_M + (start - by.start).at[key_A].get(mode='clip')
  return Layout(order_M, inside_M < by.size[key_M], place_A, size)


def padded_rows(rows: int, num_keys: int, multiple: int) -> int:
  """Rows that suffice for `rows` assignments of `num_keys` keys, each padded to a `multiple`."""
  return -(-(rows + num_keys * (multiple - 1)) // multiple) * multiple


def combine_rows(rows_MD: jax.Array, back: Permutation, weight_TK: jax.Array) -> jax.Array:
  """y_TD = sum over K of weight * row, in float32, in the rows' dtype.

  Args:
    rows_MD: rows.
    back: from rows to the T * K assignments; no row has two assignments.
    weight_TK: weight of each assignment.
  """
  return _combine(*align(rows_MD, back, weight_TK))


@jax.custom_vjp
def _combine(rows_MD, back, weight_TK):
  # One gather per copy, all in one loop over the output: no [T * K, D] array.
  return sum(row_TD * weight_TK[:, k, None] for k, row_TD in _copies(rows_MD, back, weight_TK)).astype(rows_MD.dtype)


def _combine_forward(rows_MD, back, weight_TK):
  return _combine(rows_MD, back, weight_TK), (rows_MD, back, weight_TK)


def _combine_backward(saved, dy_TD):
  rows_MD, back, weight_TK = saved
  dweight_TK = jnp.stack([(row_TD * dy_TD).sum(1) for _, row_TD in _copies(rows_MD, back, weight_TK)], axis=1)
  assignment_M, used_M = back.inverse_XK[:, 0], back.used_XK[:, 0]
  weight_M = weight_TK.ravel().at[assignment_M].get(mode='clip')
  dy_MD = _gather(dy_TD, assignment_M // weight_TK.shape[1], used_M)
  return (dy_MD * weight_M[:, None]).astype(rows_MD.dtype), None, dweight_TK.astype(weight_TK.dtype)


_combine.defvjp(_combine_forward, _combine_backward)


def _copies(rows_MD, back, weight_TK):
  """(k, float32 rows of every token's assignment k) for each k."""
  source_TK, valid_TK = (a.reshape(weight_TK.shape) for a in (back.source_Y, back.valid_Y))
  for k in range(weight_TK.shape[1]):
    yield k, _gather(rows_MD, source_TK[:, k], valid_TK[:, k]).astype(jnp.float32)
