"""Products of few rows, as generation makes them: bound by reading the weights, not by multiplying.

Weights are arrays or quantised (`moe.ops.weights`), and are read as they are: on GPUs by kernels (`few_rows_gpu`) that
dequantise the tile at hand in registers, elsewhere one expert's matrix at a time. Experts without rows are not read.
Rows may have any sizes per expert: nothing is padded, and nothing has a gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe.ops import few_rows_gpu
from moe.ops.few_rows_gpu import finish, item_of, item_rows
from moe.ops.varying import align, vary, varying_axes
from moe.ops.weights import Weight, dequantize, shape_of


def matmul(x_MD: jax.Array, w: Weight, size_e: jax.Array) -> jax.Array:
  """Multiplies each expert's rows with that expert's matrix.

  Args:
    x_MD: rows sorted by expert; the first size_e[0] belong to expert 0, and so on.
    w: [e, D, F], a matrix per expert.
    size_e: int32 rows per expert, any of them 0; their sum is at most M.

  Returns:
    y_MF in x's dtype, summed in float32. Rows past sum(size_e) are 0.
  """
  return _products(x_MD, (w,), size_e)


def swiglu(x_MD: jax.Array, w_gate: Weight, w_up: Weight, size_e: jax.Array) -> jax.Array:
  """silu(x w_gate) * (x w_up) of weights of one kind, in one pass over both; else as `matmul`."""
  return _products(x_MD, (w_gate, w_up), size_e)


def as_each(rows: int, experts: int) -> bool:
  """Whether so few rows have so many experts that most have one of their own: then `*_each` needs no sorting."""
  return item_rows(rows, experts) == 1


def matmul_each(x_TD: jax.Array, w: Weight, expert_M: jax.Array) -> jax.Array:
  """Multiplies row m // (M / T) of x with the matrix of expert_M[m], for each m.

  Args:
    x_TD: rows.
    w: [e, D, F], a matrix per expert.
    expert_M: int32; e for none. M is a multiple of T.

  Returns:
    y_MF in x's dtype, summed in float32; 0 where there is no expert.
  """
  return _each(x_TD, (w,), expert_M)


def swiglu_each(x_TD: jax.Array, w_gate: Weight, w_up: Weight, expert_M: jax.Array) -> jax.Array:
  """silu(x w_gate) * (x w_up) of weights of one kind, in one pass over both; else as `matmul_each`."""
  return _each(x_TD, (w_gate, w_up), expert_M)


def dense(x_MD: jax.Array, w: Weight) -> jax.Array:
  """All rows times one matrix [D, F]: y_MF in x's dtype, summed in float32."""
  return _dense(x_MD, (w,))


def dense_swiglu(x_MD: jax.Array, w_gate: Weight, w_up: Weight) -> jax.Array:
  """silu(x w_gate) * (x w_up) of matrices [D, F]; as `dense`."""
  return _dense(x_MD, (w_gate, w_up))


def _products(x_MD, ws, size_e):
  return lax.platform_dependent(*align(x_MD, ws, size_e), cuda=few_rows_gpu.products, default=_by_expert)


def _each(x_TD, ws, expert_M):
  return lax.platform_dependent(*align(x_TD, ws, expert_M), cuda=few_rows_gpu.products_each, default=_row_by_row)


def _row_by_row(x_TD, ws, expert_M):
  (T, _), (experts, _, F), M = x_TD.shape, shape_of(ws[0]), len(expert_M)

  def step(m, y_MF):
    expert = jnp.minimum(expert_M[m], experts - 1)
    matrices = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=expert, keepdims=False), ws)
    y = _at_once(lax.dynamic_slice_in_dim(x_TD, m // (M // T), 1), matrices)
    return lax.dynamic_update_slice_in_dim(y_MF, jnp.where(expert_M[m] < experts, y, 0), m, 0)

  return lax.fori_loop(0, M, step, vary(jnp.zeros((M, F), x_TD.dtype), varying_axes(x_TD)))


def _dense(x_MD, ws):
  return lax.platform_dependent(*align(x_MD, ws), cuda=_as_one_expert, default=_at_once)


def _as_one_expert(x_MD, ws):
  all_rows = vary(jnp.array([len(x_MD)], jnp.int32), varying_axes(x_MD))
  return few_rows_gpu.products(x_MD, jax.tree.map(lambda a: a.reshape(1, *a.shape), ws), all_rows)


def _at_once(x_MD, ws):
  """The products with matrices [D, F]. What was rounded to few bits is not rounded once more, to bfloat16."""

  def product(w):
    dtype = x_MD.dtype if isinstance(w, jax.Array) else jnp.float32
    matrix = dequantize(w, dtype)
    return jnp.dot(x_MD.astype(dtype), matrix, precision='highest', preferred_element_type=jnp.float32)

  return finish([product(w) for w in ws]).astype(x_MD.dtype)


def _by_expert(x_MD, ws, size_e):
  """Work item by work item. One with less than a tile of rows computes some of the next item's, which it then mends."""
  (rows, _), (experts, _, F) = x_MD.shape, shape_of(ws[0])
  tile = item_rows(rows, experts)
  x_MD = jnp.pad(x_MD, ((0, tile), (0, 0)))

  def step(i, y_MF):
    item = item_of(i, size_e, rows, tile)
    matrices = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=item.expert, keepdims=False), ws)
    y = _at_once(lax.dynamic_slice_in_dim(x_MD, item.row, tile), matrices)
    return lax.dynamic_update_slice_in_dim(y_MF, y, item.row, 0)

  y_MF = vary(jnp.zeros((rows + tile, F), x_MD.dtype), varying_axes(x_MD))
  count = (-(-size_e // tile)).sum()
  y_MF = lax.fori_loop(jnp.zeros_like(count), count, step, y_MF)[:rows]
  return jnp.where(jnp.arange(rows)[:, None] < size_e.sum(), y_MF, 0)
