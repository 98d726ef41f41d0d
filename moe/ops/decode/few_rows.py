"""Products of few rows, as generation makes them: bound by reading the weights, not by multiplying.

Weights are arrays or quantised (`moe.ops.weights`), and are read as they are: on GPUs by kernels (`few_rows_gpu`) that
dequantise the tile at hand in registers, elsewhere one expert's matrix at a time. Experts without rows are not read.
Rows may have any sizes per expert: nothing is padded, and nothing has a gradient. Results are in the rows' dtype, or in
float32 if the weights are float32 arrays.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe.ops.decode import few_rows_gpu
from moe.ops.decode.few_rows_gpu import count_parts, finish, item_of, item_rows, result_dtype
from moe.ops.varying import align, vary, varying_axes
from moe.ops.weights import Weight, dequantize, shape_of


def matmul(x_MD: jax.Array, w: Weight, size_e: jax.Array) -> jax.Array:
  """Multiplies each expert's rows with that expert's matrix.

  Args:
    x_MD: rows sorted by expert; the first size_e[0] belong to expert 0, and so on.
    w: [e, D, F], a matrix per expert.
    size_e: int32 rows per expert, any of them 0; their sum is at most M.

  Returns:
    y_MF, summed in float32. Rows past sum(size_e) are 0.
  """
  return _products(x_MD, (w,), size_e)


def swiglu(x_MD: jax.Array, w_gate: Weight, w_up: Weight, size_e: jax.Array) -> jax.Array:
  """silu(x w_gate) * (x w_up) of weights of one kind, in one pass over both; else as `matmul`.

  Args:
    x_MD: rows sorted by expert.
    w_gate, w_up: [e, D, F] each.
    size_e: int32 rows per expert.
  """
  return _products(x_MD, (w_gate, w_up), size_e)


def as_each(rows: int, experts: int) -> bool:
  """Whether so few rows have so many experts that most have one of their own: `feed_forward_each` sorts nothing."""
  return item_rows(rows, experts) == 1


def feed_forward_each(x_TD: jax.Array, gate: Weight, up: Weight, down: Weight, expert_M: jax.Array) -> jax.Array:
  """float32 [P, M, D] that add up, over P, to SwiGLU of row m // (M / T) of x by expert_M[m], for each m.

  On GPUs a sum has several parts, so that enough of them are under way: whoever reads the product adds them up as it
  does so. Elsewhere the other parts are zeros. If there is one part, it is in the rows' dtype.

  Args:
    x_TD: rows.
    gate, up, down: [e, D, F] twice and [e, F, D], a matrix per expert, of one kind.
    expert_M: int32; e for none, which makes 0. M is a multiple of T.
  """
  parts = count_parts((down,), 'each', len(expert_M))

  def plain(x_TD, gate, up, down, expert_M):
    return _as_parts(_row_by_row(_row_by_row(x_TD, (gate, up), expert_M), (down,), expert_M), parts)

  operands = align(x_TD, gate, up, down, expert_M)
  return lax.platform_dependent(*operands, cuda=few_rows_gpu.feed_forward_each, default=plain)


def feed_forward_dense(x_MD: jax.Array, gate: Weight, up: Weight, down: Weight, expert: int | None = None) -> jax.Array:
  """float32 [P, M, D] that add up, over P, to SwiGLU of all rows by the matrices of one expert.

  Args:
    x_MD: rows.
    gate, up, down: [D, F] twice and [F, D], or with e in front, of one kind.
    expert: number of the matrices that all rows go through; None: there is one of each.
  """
  parts = count_parts(_stack((down,), expert)[0], 'dense', len(x_MD))

  def on_gpu(x_MD, ws):
    (gate, up, down), only = _stack(ws, expert)
    return few_rows_gpu.feed_forward_dense(x_MD, gate, up, down, only)

  def plain(x_MD, ws):
    *in_ws, down = matrix(ws, expert)
    return _as_parts(_at_once(_at_once(x_MD, in_ws), (down,)), parts)

  return lax.platform_dependent(*align(x_MD, (gate, up, down)), cuda=on_gpu, default=plain)


def parts_dense(x_MD: jax.Array, w: Weight, expert: int | None = None) -> jax.Array:
  """float32 [P, M, F] that add up, over P, to all rows times one matrix: w [D, F], or expert's one of w [e, D, F]."""
  parts = count_parts(_stack((w,), expert)[0], 'dense', len(x_MD))
  on_gpu = lambda x_MD, w: few_rows_gpu.parts_dense(x_MD, *_stack(w, expert))
  plain = lambda x_MD, w: _as_parts(_at_once(x_MD, (matrix(w, expert),)), parts)
  return lax.platform_dependent(*align(x_MD, w), cuda=on_gpu, default=plain)


def matrix(ws, expert: int | None):
  """[D, F] of each weight: an expert's, if it has one per expert."""
  return ws if expert is None else jax.tree.map(lambda a: a[expert], ws)


def _products(x_MD, ws, size_e):
  return lax.platform_dependent(*align(x_MD, ws, size_e), cuda=few_rows_gpu.products, default=_by_expert)


def _row_by_row(x_TD, ws, expert_M):
  (T, _), (experts, _, F), M = x_TD.shape, shape_of(ws[0]), len(expert_M)

  def step(m, y_MF):
    expert = jnp.minimum(expert_M[m], experts - 1)
    matrices = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=expert, keepdims=False), ws)
    y = _at_once(lax.dynamic_slice_in_dim(x_TD, m // (M // T), 1), matrices)
    return lax.dynamic_update_slice_in_dim(y_MF, jnp.where(expert_M[m] < experts, y, 0), m, 0)

  return lax.fori_loop(0, M, step, vary(jnp.zeros((M, F), result_dtype(x_TD.dtype, ws)), varying_axes(x_TD)))


def _stack(ws, expert):
  """Weights of [e, D, F], and the number of the expert."""
  return (jax.tree.map(lambda a: a[None], ws), 0) if expert is None else (ws, expert)


def _as_parts(y_MF, parts: int):
  """[parts, M, F] that add up to y: y itself, then zeros."""
  return y_MF[None] if parts == 1 else jnp.pad(y_MF[None].astype(jnp.float32), ((0, parts - 1), (0, 0), (0, 0)))


def _at_once(x_MD, ws):
  """x times each matrix [D, F], or SwiGLU of two. Weights of few bits are multiplied in float32, not in bfloat16."""

  dtype = result_dtype(x_MD.dtype, ws)

  def product(w):
    common = dtype if isinstance(w, jax.Array) else jnp.float32
    return jnp.dot(x_MD.astype(common), dequantize(w, common), precision='highest', preferred_element_type=jnp.float32)

  return finish([product(w) for w in ws]).astype(dtype)


def _by_expert(x_MD, ws, size_e):
  """One work item (a tile of an expert's rows) after another.

  An item that has less than a tile of rows also computes rows of the item after it, with the wrong matrix; that item
  overwrites them.
  """
  (rows, _), (experts, _, F) = x_MD.shape, shape_of(ws[0])
  tile = item_rows(rows, experts)
  x_MD = jnp.pad(x_MD, ((0, tile), (0, 0)))

  def step(i, y_MF):
    item = item_of(i, size_e, rows, tile)
    matrices = jax.tree.map(functools.partial(lax.dynamic_index_in_dim, index=item.expert, keepdims=False), ws)
    y = _at_once(lax.dynamic_slice_in_dim(x_MD, item.row, tile), matrices)
    return lax.dynamic_update_slice_in_dim(y_MF, y, item.row, 0)

  y_MF = vary(jnp.zeros((rows + tile, F), result_dtype(x_MD.dtype, ws)), varying_axes(x_MD))
  count = (-(-size_e // tile)).sum()
  y_MF = lax.fori_loop(jnp.zeros_like(count), count, step, y_MF)[:rows]
  return jnp.where(jnp.arange(rows)[:, None] < size_e.sum(), y_MF, 0)
