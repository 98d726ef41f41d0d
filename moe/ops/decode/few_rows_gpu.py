"""Products of few rows on GPUs: one Pallas kernel, compiled by Triton, that runs at the rate of the memory.

The grid is (work items) x (tiles of columns) x (parts of the sum). A work item is a run of rows of one expert, which
each program finds from the experts' sizes. Those of an expert are neighbours, so its weights come from memory once and
then from the L2 cache. Weights are loaded as they are stored and dequantised in registers:

    more rows    go to the tensor cores, 16 or more at a time, those that are missing as zeros
    one row      does so, too, but of quantised or float32 weights: those are multiplied and added up elementwise, with
                 no tensor core, so that nothing is moved between threads until the end

Tensor cores want both operands in one type. Every E4M3 and E2M1 value is a float16 and the hardware converts pairs, so
rows are float16 then, each scaled by a power of two to just below float16's largest value: what is 2^-29 of it still
has all its bits. Scales of weights multiply partial sums: those of 128 or 32 along K that share one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.quantize_gpu import BLOCK
from moe.ops.swiglu import gated
from moe.ops.triton_call import call, span
from moe.ops.weights import DECODED, GROUP, Fp8Weight, Mxfp4Weight, decode, decode_scale, shape_of


class Tile(NamedTuple):
  """What a program works on at a time: `unroll` times `depth` along K, by `columns`; and how."""

  depth: int  # of FP8 and, on tensor cores, MXFP4: what shares a scale
  unroll: int
  columns: int
  warps: int
  stages: int


class Plan(NamedTuple):
  """Statics of a kernel."""

  kind: type
  tile: Tile
  rows: int  # of a work item
  experts: int
  K: int
  N: int
  parts: int  # of a sum
  dtype: jnp.dtype  # of rows
  unfinished: int  # parts that x comes in, of both products of a SwiGLU; 0: rows
  scaled: bool  # rows are float16, with a factor each
  items: str  # what says which rows a work item has: 'sizes' of experts, 'each' row's expert, or 'dense': all have one
  only: int  # that one


# MORE_ROWS: the best of those tried on an H200 at batch 1 (D 2048, F 1024, 6 of 64 experts). bfloat16 arrays do better
# on tensor cores even with one row, as what feeds those is loaded ahead by several steps. ONE_ROW's arrays are float32;
# its other tiles are such that registers suffice for most of a kernel's programs at a time.
ONE_ROW = {
  jax.Array: Tile(64, 1, 64, 4, 1),
  Fp8Weight: Tile(128, 2, 64, 4, 1),
  Mxfp4Weight: Tile(256, 1, 32, 4, 1),
}
MORE_ROWS = {jax.Array: Tile(64, 1, 64, 4, 4), Fp8Weight: Tile(128, 1, 64, 4, 4), Mxfp4Weight: Tile(GROUP, 4, 64, 4, 4)}
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)  # whole, for the kernel to pick from
PROGRAMS = 512  # sums are split into parts while that makes no more: too few would not keep the memory busy


class Item(NamedTuple):
  """A run of rows of one expert, or past all experts' rows: `past`, and `expert` means nothing."""

  expert: jax.Array
  row: jax.Array  # first row
  rows: jax.Array | int
  past: jax.Array | bool


def item_rows(rows: int, experts: int) -> int:
  """The most rows of a work item: 1 where few experts can have more, else 16 to 64.

  An expert that several rows share then comes from memory once, and from the L2 cache for the others.
  """
  if rows == 1 or 2 * rows <= experts:
    return 1
  return min(64, max(16, pl.next_power_of_2(pl.cdiv(2 * rows, experts + 1))))


def item_of(i, size_e, rows: int, tile: int) -> Item:
  """Work item i: runs of at most `tile` rows, expert by expert, then those of the rows that no expert has, then empty.

  Args:
    i: number of the item.
    size_e: int32 rows per expert; zeros may follow.
    rows: M.
    tile: the most rows of an item.
  """
  tiles_e, number_e = -(-size_e // tile), jnp.arange(size_e.shape[0])
  expert = (jnp.cumsum(tiles_e) <= i).astype(jnp.int32).sum()
  before_e = number_e < expert
  start, done = jnp.where(before_e, size_e, 0).sum(), (i - jnp.where(before_e, tiles_e, 0).sum()) * tile
  past = i >= tiles_e.sum()
  size = jnp.where(past, rows - start, jnp.where(number_e == expert, size_e, 0).sum())
  return Item(expert, start + done, jnp.clip(size - done, 0, tile), past)


def finish(sums):
  """What becomes of the product with one matrix, or with two: SwiGLU."""
  return sums[0] if len(sums) == 1 else gated(*sums)


def result_dtype(dtype, ws: tuple):
  """Of products of rows of `dtype`: that, or float32 if weights are float32 arrays."""
  return jnp.result_type(dtype, ws[0]) if _kind(ws[0]) is jax.Array else dtype


def products(x_MK: jax.Array, ws: tuple, size_e: jax.Array, interpret: bool = False) -> jax.Array:
  """`finish` of the products of rows with their experts' matrices, [M, N]; see `moe.ops.decode.few_rows`.

  Args:
    x_MK: rows sorted by expert.
    ws: one or two weights [e, K, N] of one kind.
    size_e: rows per expert.
    interpret: run by jnp instead, on any platform.
  """
  return _finished(_call(x_MK, ws, 'sizes', size_e, len(x_MK), interpret), result_dtype(x_MK.dtype, ws))


def parts_dense(x_MK: jax.Array, w, expert: int, interpret: bool = False) -> jax.Array:
  """float32 [`count_parts`, M, N] that add up to the product of all rows with one expert's matrix.

  Args:
    x_MK: rows.
    w: weight [e, K, N], an array or quantised.
    expert: number of the matrix.
    interpret: run by jnp instead, on any platform.
  """
  return _call(x_MK, (w,), 'dense', None, len(x_MK), interpret, expert)[:, 0]


def feed_forward_each(x_TD, gate, up, down, expert_M, interpret: bool = False) -> jax.Array:
  """float32 [`count_parts`, M, D] that add up to SwiGLU of row m // (M / T) by expert_M[m]; 0 for expert e.

  Args:
    x_TD, gate, up, down, expert_M: as of `few_rows.feed_forward_each`.
    interpret: run by jnp instead, on any platform.
  """
  return _feed_forward(x_TD, gate, up, down, 'each', expert_M, len(expert_M), interpret)


def feed_forward_dense(x_MD, gate, up, down, expert: int, interpret: bool = False) -> jax.Array:
  """The same of all rows by one expert.

  Args:
    x_MD: rows.
    gate, up, down: [e, D, F] twice and [e, F, D], of one kind.
    expert: number of the matrices.
    interpret: run by jnp instead, on any platform.
  """
  return _feed_forward(x_MD, gate, up, down, 'dense', None, len(x_MD), interpret, expert)


def _feed_forward(x, gate, up, down, items: str, of_items, M: int, interpret: bool, only: int = 0):
  hidden = _call(x, (gate, up), items, of_items, M, interpret, only)
  dtype = result_dtype(x.dtype, (gate,))
  return _call(hidden, (down,), items, of_items, M, interpret, only, dtype)[:, 0]


def count_parts(ws: tuple, items: str, M: int) -> int:
  """Into how many parts the sums of M rows times ws are split; items: as in Plan."""
  (experts, K, N), (_, tile) = shape_of(ws[0]), _rows_and_tile(ws, items, M)
  programs, steps = (
    (1 if items == 'dense' else min(experts, M)) * pl.cdiv(N, tile.columns),
    pl.cdiv(K, tile.depth * tile.unroll),
  )
  return min(steps, max(1, PROGRAMS // programs))


def _call(x_MK, ws, items: str, of_items, M: int, interpret: bool, only: int = 0, dtype=None):
  """The products' parts, float32 [parts, len(ws), M, N]; of one part what is finished, in `result_dtype`: [1, 1, M, N].

  Args:
    x_MK: rows, or what a call for a SwiGLU has returned: its parts are added up and finished by those who read them,
      if each work item is one row. items, only: as in Plan. of_items: the sizes, or each row's expert, or None. dtype:
      of rows, where x is parts.
  """
  dtype = dtype or x_MK.dtype
  (experts, K, N), kind = shape_of(ws[0]), _kind(ws[0])
  if any(_kind(w) is not kind for w in ws):
    raise ValueError(f'weights of one product must be of one kind, not {", ".join(_kind(w).__name__ for w in ws)}')
  _check_offsets(ws)
  (rows, tile), parts = _rows_and_tile(ws, items, M), count_parts(ws, items, M)
  scaled, unfinished = rows > 1 and kind is not jax.Array and dtype == jnp.bfloat16, 0
  if x_MK.ndim == 4:
    alone = items == 'each' or M == 1
    unfinished = len(x_MK) if alone and len(x_MK) > 1 and not scaled else 0
    x_MK = x_MK.reshape(-1, M, K) if unfinished else _finished(x_MK, dtype)
  operands = [*_as_float16(x_MK)] if scaled else [x_MK]
  plan = Plan(kind, tile, rows, experts, K, N, parts, jnp.dtype(dtype), unfinished, scaled, items, only)
  if _ways(kind) > 1:
    operands[0] = operands[0].reshape(*x_MK.shape[:-1], -1, _ways(kind))
  operands += jax.tree.leaves((ws, of_items))
  grid = _count_items(items, rows, experts, M), pl.cdiv(N, tile.columns), parts
  out = ((1, M, N), result_dtype(dtype, ws)) if parts == 1 else ((parts * len(ws), M, N), jnp.float32)
  kernel, specs = functools.partial(_kernel, plan=plan), [ANYWHERE] * len(operands)
  (y,) = call(kernel, grid, operands, specs, [(*out, ANYWHERE)], tile.warps, tile.stages, interpret)
  return y.reshape(parts, -1, M, N)


def _finished(parts_PWMN, dtype):
  """[M, N] of what `_call` returns."""
  return finish(list(parts_PWMN.sum(0))).astype(dtype) if len(parts_PWMN) > 1 else parts_PWMN[0, 0]


def _rows_and_tile(ws, items: str, M: int) -> tuple[int, Tile]:
  """The most rows of a work item, and how a program goes about it."""
  kind, experts = _kind(ws[0]), 1 if items == 'dense' else shape_of(ws[0])[0]
  rows = 1 if items == 'each' else item_rows(M, experts)
  if rows == 1 and kind in ONE_ROW and (kind is not jax.Array or ws[0].dtype == jnp.float32):
    return 1, ONE_ROW[kind]
  return max(rows, 16), MORE_ROWS[kind]


def _count_items(items: str, rows: int, experts: int, M: int) -> int:
  if items != 'sizes':
    return M if items == 'each' else pl.cdiv(M, rows)
  groups = min(experts + 1, M)  # the experts with rows, and the rows of none
  return groups + (M - groups) // rows


def _kind(w):
  return type(w) if isinstance(w, Fp8Weight | Mxfp4Weight) else jax.Array


def _check_offsets(ws):
  """Pallas computes offsets in int32 up to 4 GiB, so bytes past the first 2 GiB would be found elsewhere."""
  for leaf in jax.tree.leaves(ws):
    if leaf.size > 2**31 and leaf.size * leaf.dtype.itemsize <= 2**32:
      raise ValueError(f'weights of {leaf.size} values in {leaf.dtype} are past what a kernel can address: pass less')


def _as_float16(x_MK):
  """(x times a power of two per row, as float16; float32 [M]: the power that undoes it)."""
  amax_M = jnp.abs(x_MK).max(1).astype(jnp.float32)
  exponent_M = jnp.clip(lax.bitcast_convert_type(amax_M, jnp.int32) >> 23, 15, 254)  # biased
  up_M = lax.bitcast_convert_type((268 - exponent_M) << 23, jnp.float32)  # largest values in [2^14, 2^15)
  return (x_MK * up_M[:, None]).astype(jnp.float16), lax.bitcast_convert_type((exponent_M - 14) << 23, jnp.float32)


def _kernel(x, *refs, plan: Plan):
  *of_weights, out = refs
  factor = of_weights.pop(0) if plan.scaled else None
  of_items = None if plan.items == 'dense' else of_weights.pop()
  pairs = zip(of_weights[::2], of_weights[1::2], strict=False)
  ws = of_weights if plan.kind is jax.Array else [plan.kind(*pair) for pair in pairs]
  tile, rows = plan.tile, plan.rows
  item, x_row = _item(of_items, x, out, plan)
  mine, column = jnp.arange(rows) < item.rows, pl.program_id(1) * tile.columns

  def step(j, sums):
    at = [(j * tile.unroll + u) * tile.depth for u in range(tile.unroll)]
    # All loads come before all arithmetic, so that they are under way together.
    loads = [(_load_rows(x, x_row, mine, k, plan), [_load(w, item.expert, k, column, plan) for w in ws]) for k in at]
    for xs, stored in loads:
      sums = [_add(total, xs, *_dequantized(w)) for total, w in zip(sums, stored, strict=True)]
    return tuple(sums)

  steps = pl.cdiv(plan.K, tile.depth * tile.unroll)
  first, last = pl.program_id(2) * pl.cdiv(steps, plan.parts), (pl.program_id(2) + 1) * pl.cdiv(steps, plan.parts)
  last = jnp.where(item.past, first, jnp.minimum(last, steps))
  height = rows if rows > 1 else _kept(ws[0], plan)
  sums = lax.fori_loop(first, last, step, tuple(jnp.zeros((height, tile.columns)) for _ in ws))
  if rows == 1:
    sums = [total.sum(0, keepdims=True) for total in sums]
  unit: jax.Array | float = DECODED if plan.kind is Mxfp4Weight else 1.0
  if factor is not None:
    unit = unit * plt.load(factor.at[pl.ds(x_row, rows)], mask=mine, other=0)[:, None]
  sums = [total * unit for total in sums]
  here = mine[:, None] & (column + jnp.arange(tile.columns) < plan.N)[None]
  results = sums if plan.parts > 1 else [finish(sums)]
  for i, result in enumerate(results):
    place = out.at[pl.program_id(2) * len(results) + i, pl.ds(item.row, rows), pl.ds(column, tile.columns)]
    plt.store(place, result.astype(out.dtype), mask=here)


def _kept(w, plan):
  """Of one row, how many sums per column there are until the end: as many as threads load at once, 16 bytes each."""
  at_once = plan.tile.warps * 32 * 16 // jax.tree.leaves(w)[0].dtype.itemsize // plan.tile.columns
  return min(at_once, plan.tile.depth // _ways(plan.kind))


def _item(of_items, x, out, plan):
  """This program's work item, and its first row of x."""
  i, x_rows = pl.program_id(0), x.shape[1 if plan.unfinished else 0]
  if plan.items == 'dense':  # nothing to look up, which would delay all other loads
    row, only = i * plan.rows, plan.only + i * 0  # no constant: the interpreter of jax 0.10 takes none as an index
    return Item(only, row, jnp.minimum(x_rows - row, plan.rows), False), row
  if plan.items == 'each':
    expert = of_items[i]
    return Item(expert, i, 1, expert == plan.experts), i // (out.shape[1] // x_rows)
  at_e, inside_e = span(i * 0, plan.experts)
  size_e = plt.load(of_items.at[at_e], mask=inside_e, other=0)
  item = item_of(i, size_e, x_rows, plan.rows)
  return item, item.row


def _ways(kind):
  """How many rows of K stand in one row of the weights as they are stored."""
  return 2 if kind is Mxfp4Weight else 1


def _load_rows(x, row, mine, k, plan):
  """The item's rows by `depth` of K: all, or the even and the odd ones, from [M, K] or [M, K / 2, 2]."""
  if plan.unfinished:
    return _finish_row(x, row, mine, k, plan)
  ways = _ways(plan.kind)
  height = plan.tile.depth // ways
  mask = mine[:, None] & (k // ways + jnp.arange(height) < plan.K // ways)[None]
  place = pl.ds(row, plan.rows), pl.ds(k // ways, height)
  if ways == 1:
    return [plt.load(x.at[place], mask=mask, other=0)]
  of_way = lambda way: plt.load(x.at[*place, pl.ds(way, 1)], mask=mask[..., None], other=0).reshape(mask.shape)
  return [of_way(way) for way in range(ways)]


def _finish_row(x, row, mine, k, plan):
  """The same of an item that is one row, from parts of both products: [2 P, M, K] or [2 P, M, K / 2, 2]."""
  ways = _ways(plan.kind)
  width = plan.tile.depth // ways
  columns = pl.ds(k // ways, width)
  inside = k // ways + jnp.arange(width) < plan.K // ways

  def load(i, way):
    at = x.at[row * 0 + i, row, columns]  # no constant index, as above
    if ways == 1:
      return plt.load(at, mask=inside, other=0)
    return plt.load(x.at[row * 0 + i, row, columns, pl.ds(way, 1)], mask=inside[:, None], other=0).reshape(inside.shape)

  parts = range(plan.unfinished)
  sums = [[sum(load(2 * part + i, way) for part in parts) for i in range(2)] for way in range(ways)]
  return [jnp.where(mine[:, None], finish(of_way).astype(plan.dtype), 0) for of_way in sums]


def _load(w, expert, k, column, plan):
  """The weights of `depth` of K, as they are stored."""
  tile = functools.partial(_load_tile, expert=expert, column=column, plan=plan)
  depth = plan.tile.depth
  if plan.kind is Mxfp4Weight:
    scale = tile(w.scale, k // GROUP, 1) if plan.rows > 1 else _load_scales(w, expert, k, column, plan)
    return Mxfp4Weight(tile(w.packed, k // 2, depth // 2), scale)
  if plan.kind is Fp8Weight:
    return Fp8Weight(tile(w.value, k, depth), w.scale[expert, jnp.minimum(k, plan.K - 1) // BLOCK, column // BLOCK])
  return tile(w, k, depth)


def _load_scales(w, expert, k, column, plan):
  """A scale for each byte of a tile: each thread loads those of its bytes, or else these would move to their scales."""
  row = (k // 2 + jnp.arange(plan.tile.depth // 2))[:, None] // (GROUP // 2)
  columns = column + jnp.arange(plan.tile.columns)[None]
  return plt.load(w.scale.at[expert, row, columns], mask=(row < w.scale.shape[1]) & (columns < plan.N), other=0)


def _load_tile(w, k, height, expert, column, plan):
  """[height, columns] of w [e, rows, N] at (k, column): zeros past the edges, which only the last tiles can reach."""
  mask, other = None, None
  if plan.K % (plan.tile.depth * plan.tile.unroll) or plan.N % plan.tile.columns:
    inside = (k + jnp.arange(height) < w.shape[1])[:, None]
    mask = inside & (column + jnp.arange(plan.tile.columns) < plan.N)[None]
    other = 0.0 if jnp.issubdtype(w.dtype, jnp.floating) else 0
  return plt.load(w.at[expert, pl.ds(k, height), pl.ds(column, plan.tile.columns)], mask=mask, other=other)


def _dequantized(w):
  """(tiles, one or the even and the odd rows of K; what their products are to be multiplied by)."""
  if isinstance(w, Mxfp4Weight):
    return [decode(w.packed, high=False), decode(w.packed, high=True)], decode_scale(w.scale)
  if isinstance(w, Fp8Weight):
    return [w.value.astype(jnp.float16)], w.scale
  return [w], 1.0


def _add(total, xs, tiles, scale):
  """total + scale * sum of rows times tiles; of one row, sums that are still to be added up."""
  if xs[0].shape[0] > 1:
    common = jnp.result_type(xs[0], tiles[0])
    product = lambda x, tile: plt.dot(x.astype(common), tile.astype(common), allow_tf32=False)
    return total + scale * sum(product(x, tile) for x, tile in zip(xs, tiles, strict=True))
  product = lambda x, tile: x.astype(jnp.float32).reshape(-1, 1) * tile.astype(jnp.float32)
  of_each = sum(product(x, tile) for x, tile in zip(xs, tiles, strict=True))
  summed = lambda a: a.reshape(-1, *total.shape).sum(0)  # each thread its own, so that nothing moves
  return total + (scale * summed(of_each) if jnp.ndim(scale) == 0 else summed(scale * of_each))
