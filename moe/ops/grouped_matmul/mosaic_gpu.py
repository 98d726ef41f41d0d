"""Grouped matmul for Hopper GPUs (H20, H100, H200) in Pallas Mosaic GPU: bf16 operands, float32 sums.

Two persistent kernels, one block per SM, each with one warpgroup that loads and two that multiply:

    rows by matrix   y_MF = x_MD w_eDF    and    dx_MD = dy_MF w_eDF^T
    rows by rows     dw_eDF = x_MD^T dy_MF, per expert

The loader runs ahead through a ring of shared-memory slots, across tile borders, so that the tensor cores meet no gap
between tiles. Tiles begin where an expert's rows begin, so no tile holds rows of two experts: which expert and rows a
tile has stands in a table made outside, and costs nothing per expert. The last tile of an expert is moved back to end
with it and computes some rows twice, to equal values; only an expert with less than a tile of rows stores part of one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.ops.varying import vary, varying_axes

TILE_M, TILE_K, SLOTS = 128, 64, 4
ROW_MULTIPLE = 8  # of every expert's rows: shared memory is swizzled in groups of 8 rows
WG_ROWS = TILE_M // 2  # rows of a tile that each multiplying warpgroup computes
OUT_COLUMNS = 64  # stored at a time
WIDTH_MULTIPLE = 64  # of D and F: the width of a swizzled row in shared memory
BAND = 16  # tiles of rows that run over the same columns together, for the L2 cache's sake
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232
DEFAULT_SMS = 132  # of an H100, where the program is only lowered


def matmul(x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array) -> jax.Array:
  """See `moe.ops.grouped_matmul.grouped_matmul`. bfloat16; all size_e are multiples of ROW_MULTIPLE.

  Widths that are no multiple of WIDTH_MULTIPLE are padded, at the cost of copies.
  """
  rows, F = len(x_MD), w_eDF.shape[2]
  x_MD = _pad(x_MD, ROW_MULTIPLE, WIDTH_MULTIPLE)
  return _product(x_MD, _pad(w_eDF, 1, WIDTH_MULTIPLE, WIDTH_MULTIPLE), size_e)[:rows, :F]


def _pad(a, *multiples):
  return jnp.pad(a, [(0, -size % multiple) for size, multiple in zip(a.shape, multiples, strict=True)])


@jax.custom_vjp
def _product(x_MD, w_eDF, size_e):
  return _rows_by_matrix(x_MD, w_eDF, size_e, transpose=False)


def _forward(x_MD, w_eDF, size_e):
  return _product(x_MD, w_eDF, size_e), (x_MD, w_eDF, size_e)


def _backward(saved, dy_MF):
  x_MD, w_eDF, size_e = saved
  return _rows_by_matrix(dy_MF, w_eDF, size_e, transpose=True), _rows_by_rows(x_MD, dy_MF, size_e), None


_product.defvjp(_forward, _backward)


class Tiles(NamedTuple):
  """Tiles of TILE_M rows, in row order. count: int32 [1]; the others per tile, of which the first `count` are used."""

  count: jax.Array
  expert: jax.Array
  row: jax.Array  # first row
  rows: jax.Array  # rows to store: TILE_M, or the whole of a smaller expert


def tile_table(size_e: jax.Array, rows: int) -> Tiles:
  """Which expert and rows each tile has."""
  tiles_e = -(-size_e // TILE_M)
  end_e, tiles_end_e = jnp.cumsum(size_e), jnp.cumsum(tiles_e)
  tile = jnp.arange(rows // TILE_M + len(size_e))
  expert = jnp.minimum(jnp.searchsorted(tiles_end_e, tile, side='right'), len(size_e) - 1)
  size, end = size_e[expert], end_e[expert]
  row = end - size + (tile - (tiles_end_e - tiles_e)[expert]) * TILE_M
  row = jnp.where(size >= TILE_M, jnp.minimum(row, end - TILE_M), row)
  cast = lambda a: a.astype(jnp.int32)
  return Tiles(cast(tiles_end_e[-1:]), cast(expert), cast(row), cast(jnp.minimum(end - row, TILE_M)))


def _rows_by_matrix(x_MK, w, size_e, transpose: bool):
  """y[r] = x[r] @ w[expert of r], or @ w[...]^T if `transpose`."""
  M, K = x_MK.shape
  N = w.shape[1 if transpose else 2]
  if not M:
    return vary(jnp.zeros((M, N), x_MK.dtype), varying_axes(x_MK))
  tile_n = 256 if N > 128 else 128
  n_tiles, k_steps = pl.cdiv(N, tile_n), pl.cdiv(K, TILE_K)

  def body(count, expert, row, rows, x, w, y, ring_x, ring_w, out, full, empty):
    def item(i):
      # Bands of BAND row tiles; inside, all row tiles of a band before the next column tile.
      first = i // (BAND * n_tiles) * BAND
      width = jnp.minimum(BAND, count[0] - first)
      inside = i - first * n_tiles
      m, n = first + inside % width, inside // width
      return expert[m], pl.multiple_of(row[m], ROW_MULTIPLE), rows[m], n * tile_n

    def load(info, k, slot, barrier):
      e, r, _, n = info
      plgpu.copy_gmem_to_smem(x.at[pl.ds(r, TILE_M), pl.ds(k * TILE_K, TILE_K)], ring_x.at[slot], barrier)
      w_k, w_n = pl.ds(k * TILE_K, TILE_K), pl.ds(n, tile_n)
      plgpu.copy_gmem_to_smem(w.at[(e, w_n, w_k) if transpose else (e, w_k, w_n)], ring_w.at[slot], barrier)

    def multiply(info, k, slot, acc, wg):
      tile_w = plgpu.transpose_ref(ring_w.at[slot], (1, 0)) if transpose else ring_w.at[slot]
      plgpu.wgmma(acc, ring_x.at[slot, pl.ds(wg * WG_ROWS, WG_ROWS)], tile_w)

    def store(info, sums, wg):
      _, r, rows, n = info
      target = y.at[:, pl.ds(n, tile_n)]
      _store(sums, out.at[wg], target, r + wg * WG_ROWS, rows - wg * WG_ROWS)

    _run(count[0] * n_tiles, item, lambda info: k_steps, load, multiply, store, tile_n, full, empty)

  shapes = [(TILE_M, TILE_K), (tile_n, TILE_K) if transpose else (TILE_K, tile_n)]
  return _call(body, shapes, tile_n, (M, N), x_MK.dtype, *tile_table(size_e, M), x_MK, w)


def _rows_by_rows(x_MD, dy_MF, size_e):
  """dw[e] = x^T dy over the rows of expert e."""
  (M, D), F, E = x_MD.shape, dy_MF.shape[1], len(size_e)
  if not M:
    return vary(jnp.zeros((E, D, F), x_MD.dtype), varying_axes(x_MD))
  tile_f = 256 if F > 128 else 128
  d_tiles, f_tiles = pl.cdiv(D, TILE_M), pl.cdiv(F, tile_f)

  def body(size, start, x, dy, dw, ring_x, ring_dy, out, full, empty):
    def item(i):
      e, inside = i // (d_tiles * f_tiles), i % (d_tiles * f_tiles)
      first = pl.multiple_of(start[e], ROW_MULTIPLE)
      return e, size[e], first, inside % d_tiles * TILE_M, inside // d_tiles * tile_f

    def load(info, k, slot, barrier):
      _, _, first, d, f = info
      rows = pl.ds(first + k * TILE_K, TILE_K)
      plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(d, TILE_M)], ring_x.at[slot], barrier)
      plgpu.copy_gmem_to_smem(dy.at[rows, pl.ds(f, tile_f)], ring_dy.at[slot], barrier)

    def multiply(info, k, slot, acc, wg):
      left = info[1] - k * TILE_K
      tile_x = ring_x.at[slot, :, pl.ds(wg * WG_ROWS, WG_ROWS)]

      @pl.when(left < TILE_K)  # the rows after are another expert's, or nobody's and perhaps not finite
      def _():
        for part in (tile_x, ring_dy.at[slot]):
          row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, part.shape, 0), plgpu.Layout.WGMMA)
          part[...] = jnp.where(row < left, part[...], 0)
        plgpu.commit_smem()

      plgpu.wgmma(acc, plgpu.transpose_ref(tile_x, (1, 0)), ring_dy.at[slot])

    def store(info, sums, wg):
      e, _, _, d, f = info
      _store(sums, out.at[wg], dw.at[e, :, pl.ds(f, tile_f)], d + wg * WG_ROWS, WG_ROWS)

    k_steps = lambda info: (info[1] + TILE_K - 1) // TILE_K
    _run(E * d_tiles * f_tiles, item, k_steps, load, multiply, store, tile_f, full, empty)

  start_e = jnp.cumsum(size_e) - size_e
  shapes = [(TILE_K, TILE_M), (TILE_K, tile_f)]
  return _call(body, shapes, tile_f, (E, D, F), x_MD.dtype, size_e, start_e.astype(jnp.int32), x_MD, dy_MF)


def _run(total, item, k_steps, load, multiply, store, columns, full, empty):
  """What each block does with its share of `total` work items: the loader's and the multipliers' loops."""
  sm, sms, wg = lax.axis_index('sm'), lax.axis_size('sm'), lax.axis_index('wg')
  mine = (total - sm + sms - 1) // sms

  @pl.when(wg == 2)
  def _():
    plgpu.set_max_registers(LOADER_REGISTERS, action='decrease')

    def per_item(j, step):
      info = item(sm + j * sms)

      def per_k(k, _):
        slot = lax.rem(step + k, SLOTS)
        plgpu.barrier_wait(empty.at[slot])
        load(info, k, slot, full.at[slot])

      lax.fori_loop(0, k_steps(info), per_k, None)
      return step + k_steps(info)

    lax.fori_loop(0, mine, per_item, jnp.int32(0))
    for slot in range(SLOTS):  # no barrier may be left with an arrival that nobody waited for
      plgpu.barrier_wait(empty.at[slot])

  @pl.when(wg < 2)
  def _():
    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action='increase')
    for slot in range(SLOTS):
      plgpu.barrier_arrive(empty.at[slot])

    def per_item(j, step):
      info = item(sm + j * sms)

      def sums(acc):
        def per_k(k, _):
          plgpu.barrier_wait(full.at[lax.rem(step + k, SLOTS)])
          multiply(info, k, lax.rem(step + k, SLOTS), acc, wg)
          plgpu.wgmma_wait(1)

          @pl.when(k > 0)  # the product before this one is done with its slot
          def _():
            plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, SLOTS)])

        lax.fori_loop(0, k_steps(info), per_k, None)
        return acc[...]

      result = pl.run_scoped(sums, plgpu.ACC((WG_ROWS, columns), jnp.float32))

      @pl.when(k_steps(info) > 0)
      def _():
        plgpu.barrier_arrive(empty.at[lax.rem(step + k_steps(info) - 1, SLOTS)])

      store(info, result, wg)
      return step + k_steps(info)

    lax.fori_loop(0, mine, per_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _store(sums, staging, target, row, rows):
  """Writes the first `rows` of sums [WG_ROWS, columns], none if negative, to `target` from `row` on.

  Goes through two alternating pieces of shared memory. The size of a copy is static, so less than all rows take one
  copy per binary digit of their number.
  """
  for i in range(sums.shape[1] // OUT_COLUMNS):
    columns = pl.ds(i * OUT_COLUMNS, OUT_COLUMNS)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    piece = staging.at[i % 2]
    piece[...] = sums[:, i * OUT_COLUMNS : (i + 1) * OUT_COLUMNS].astype(staging.dtype)
    plgpu.commit_smem()
    size, left = WG_ROWS, jnp.clip(rows, 0, WG_ROWS)
    while size >= ROW_MULTIPLE:
      done = pl.multiple_of(left & ~(2 * size - 1), ROW_MULTIPLE)

      @pl.when(left & size != 0)
      def _(piece=piece, size=size, done=done, columns=columns):
        to = target.at[pl.ds(pl.multiple_of(row + done, ROW_MULTIPLE), size), columns]
        plgpu.copy_smem_to_gmem(piece.at[pl.ds(done, size)], to, commit_group=False)

      size //= 2
    plgpu.commit_smem_to_gmem_group()


def _call(body, slot_shapes, columns, shape, dtype, *operands):
  """Calls a kernel whose ring has two operands of these shapes per slot."""
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  rings = [plgpu.SMEM((SLOTS, *slot), dtype, transforms=transforms) for slot in slot_shapes]
  staging = plgpu.SMEM((2, 2, WG_ROWS, OUT_COLUMNS), dtype, transforms=transforms)
  barrier = plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS)
  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(shape, dtype),
    scratch_types=[*rings, staging, barrier, barrier],
    grid=(_num_sms(),),
    grid_names=('sm',),
    num_threads=3,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
  )
  # A kernel's output carries no varying axes: without the cast, autodiff would add wrong reductions.
  return vary(kernel(*operands), varying_axes(operands))


def _num_sms() -> int:
  device = jax.devices()[0]
  return device.core_count if device.platform == 'gpu' else DEFAULT_SMS
