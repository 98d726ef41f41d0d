"""Grouped FP8 x FP8 matmuls with block scales for Hopper GPUs in Pallas Mosaic GPU (arXiv 2412.19437, section 3.3).

Hopper's tensor cores keep only about 14 bits of an FP8 product's sum. So they sum each 128 alone, and the results are
added up in float32 registers, where the scales of both operands are applied as well:

    rows by matrix   y[r, n]     = sum over k:  scale_x[r, k] * scale_w[e, n / 128, k] * (x[r, k] @ w[e, n, k])
    rows by rows     dw[e, d, f] = sum over b:  scale_x[b, d] * scale_dy[b, f]         * (x[d, b] @ dy[f, b])

k are blocks of K, b those of expert e's tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.ops.grouped_matmul import _persistent as persistent
from moe.ops.grouped_matmul._persistent import WG_ROWS, Tiles, tile_table

BLOCK = 128  # of K and N: one scale
MULTIPLIERS, SLOTS = 3, 4  # with a third multiplier, the tensor cores work while the others add up
TILE_M = MULTIPLIERS * WG_ROWS


@functools.partial(jax.jit, static_argnames='out_dtype')  # lowered once for all products of a shape
def rows_by_matrix(x_MK, scale_MB, w_eNK, scale_eAB, size_e, out_dtype) -> jax.Array:
  """y[r] = dequantised x[r] @ dequantised w[expert of r]^T.

  Args:
    x_MK: float8_e4m3fn rows; K is a multiple of BLOCK.
    scale_MB: float32 scale per row and block of K.
    w_eNK: float8_e4m3fn; N is a multiple of BLOCK. The tensor cores take FP8 operands with K last only.
    scale_eAB: float32 scale per expert, block of N and block of K.
    size_e: rows per expert, multiples of `persistent.ROW_MULTIPLE`.
    out_dtype: bfloat16 or float32.

  Returns:
    y_MN; rows past sum(size_e) are unspecified.
  """
  (M, K), N = x_MK.shape, w_eNK.shape[1]
  if not M:
    return persistent.zeros_like_kernel((M, N), out_dtype, x_MK)
  n_tiles, k_steps = N // BLOCK, K // BLOCK

  def body(count, expert, row, rows, x, x_scale, w, w_scale, y, ring_x, ring_scale, ring_w, out, full, empty):
    item = lambda i: persistent.tile_of(i, Tiles(count, expert, row, rows), n_tiles, BLOCK)

    def load(info, k, slot, barrier):
      e, r, _, n = info
      columns, tile_rows = pl.ds(k * BLOCK, BLOCK), pl.ds(r, TILE_M)
      plgpu.copy_gmem_to_smem(x.at[tile_rows, columns], ring_x.at[slot], barrier)
      plgpu.copy_gmem_to_smem(x_scale.at[k, tile_rows], ring_scale.at[slot], barrier)
      plgpu.copy_gmem_to_smem(w.at[e, pl.ds(n, BLOCK), columns], ring_w.at[slot], barrier)

    def multiply(info, first, wg):
      e, _, _, n = info
      mine = pl.ds(wg * WG_ROWS, WG_ROWS)

      def per_k(k, carry):
        total, scale = carry
        slot = lax.rem(first + k, SLOTS)
        next_scale = w_scale[e, n // BLOCK, jnp.minimum(k + 1, k_steps - 1)]  # on its way while this product runs
        plgpu.barrier_wait(full.at[slot])
        row_scale = plgpu.layout_cast(ring_scale[slot, mine], plgpu.Layout.WGMMA.reduce(1))

        def product(acc):
          plgpu.wgmma(acc, ring_x.at[slot, mine], ring_w.at[slot].transpose((1, 0)))
          return acc[...]

        sums = pl.run_scoped(product, plgpu.ACC((WG_ROWS, BLOCK), jnp.float32))
        plgpu.barrier_arrive(empty.at[slot])
        return total + sums * lax.broadcast_in_dim(row_scale * scale, sums.shape, (0,)), next_scale

      nothing = plgpu.layout_cast(jnp.zeros((WG_ROWS, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
      return lax.fori_loop(0, k_steps, per_k, (nothing, w_scale[e, n // BLOCK, 0]))[0]

    def store(info, sums, wg):
      _, r, rows, n = info
      target = y.at[:, pl.ds(n, BLOCK)]
      persistent.store_rows(sums, out.at[wg], target, r + wg * WG_ROWS, rows - wg * WG_ROWS)

    persistent.run(
      count[0] * n_tiles, item, lambda info: k_steps, load, multiply, store, SLOTS, full, empty, MULTIPLIERS
    )

  ring = {
    'x': ((TILE_M, BLOCK), x_MK.dtype),
    'scale': ((TILE_M,), jnp.float32),
    'w': ((BLOCK, BLOCK), w_eNK.dtype),
  }
  operands = (*tile_table(size_e, M, TILE_M), x_MK, scale_MB.T, w_eNK, scale_eAB)
  return persistent.call(body, SLOTS, ring, (M, N), out_dtype, *operands, multipliers=MULTIPLIERS)


@functools.partial(jax.jit, static_argnames='out_dtype')
def rows_by_rows(x_DM, scale_BD, dy_FM, scale_BF, first_e, blocks_e, out_dtype) -> jax.Array:
  """dw[e] = dequantised x @ dequantised dy^T, over the tokens of expert e.

  Args:
    x_DM: float8_e4m3fn, tokens last, in blocks of BLOCK tokens of one expert each, filled up with zeros; D is a
      multiple of BLOCK.
    scale_BD: float32 scale per block of tokens and row of x.
    dy_FM, scale_BF: likewise.
    first_e: int32 first block of each expert.
    blocks_e: int32 blocks of each expert, any of them 0.
    out_dtype: bfloat16 or float32.

  Returns:
    dw_eDF.
  """
  (D, M), F, E = x_DM.shape, len(dy_FM), len(first_e)
  if not M:
    return persistent.zeros_like_kernel((E, D, F), out_dtype, x_DM)
  d_tiles, f_tiles = pl.cdiv(D, TILE_M), F // BLOCK

  def body(first, blocks, x, x_scale, dy, dy_scale, dw, ring_x, ring_row, ring_dy, ring_column, out, full, empty):
    def item(i):
      e, inside = i // (d_tiles * f_tiles), i % (d_tiles * f_tiles)
      return e, first[e], blocks[e], inside % d_tiles * TILE_M, inside // d_tiles * BLOCK

    def load(info, k, slot, barrier):
      _, first_block, _, d, f = info
      block, tile_d, tile_f = first_block + k, pl.ds(d, TILE_M), pl.ds(f, BLOCK)
      tokens = pl.ds(block * BLOCK, BLOCK)
      plgpu.copy_gmem_to_smem(x.at[tile_d, tokens], ring_x.at[slot], barrier)
      plgpu.copy_gmem_to_smem(x_scale.at[block, tile_d], ring_row.at[slot], barrier)
      plgpu.copy_gmem_to_smem(dy.at[tile_f, tokens], ring_dy.at[slot], barrier)
      plgpu.copy_gmem_to_smem(dy_scale.at[block, tile_f], ring_column.at[slot], barrier)

    def multiply(info, first_step, wg):
      mine = pl.ds(wg * WG_ROWS, WG_ROWS)

      def per_block(k, total):
        slot = lax.rem(first_step + k, SLOTS)
        plgpu.barrier_wait(full.at[slot])

        def product(acc):
          plgpu.wgmma(acc, ring_x.at[slot, mine], ring_dy.at[slot].transpose((1, 0)))
          return acc[...]

        sums = pl.run_scoped(product, plgpu.ACC((WG_ROWS, BLOCK), jnp.float32))
        # Only now, and until all is added up: beside the sums and the total, 34 scales do not fit in the registers.
        row = plgpu.layout_cast(ring_row[slot, mine], plgpu.Layout.WGMMA.reduce(1))
        column = plgpu.layout_cast(ring_column[slot], plgpu.Layout.WGMMA.reduce(0))
        row, column = (lax.broadcast_in_dim(a, sums.shape, (axis,)) for axis, a in enumerate((row, column)))
        total = total + sums * column * row
        plgpu.barrier_arrive(empty.at[slot])
        return total

      nothing = plgpu.layout_cast(jnp.zeros((WG_ROWS, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
      return lax.fori_loop(0, info[2], per_block, nothing)

    def store(info, sums, wg):
      e, _, _, d, f = info
      row = d + wg * WG_ROWS
      persistent.store_rows(sums, out.at[wg], dw.at[e, :, pl.ds(f, BLOCK)], row, D - row)

    persistent.run(
      E * d_tiles * f_tiles, item, lambda info: info[2], load, multiply, store, SLOTS, full, empty, MULTIPLIERS
    )

  ring = {
    'x': ((TILE_M, BLOCK), x_DM.dtype),
    'row': ((TILE_M,), jnp.float32),
    'dy': ((BLOCK, BLOCK), dy_FM.dtype),
    'column': ((BLOCK,), jnp.float32),
  }
  operands = (first_e, blocks_e, x_DM, scale_BD, dy_FM, scale_BF)
  return persistent.call(body, SLOTS, ring, (E, D, F), out_dtype, *operands, multipliers=MULTIPLIERS)
