"""Grouped FP8 x FP8 matmul with block scales for Hopper GPUs in Pallas Mosaic GPU (arXiv 2412.19437, section 3.3).

Hopper's tensor cores keep only about 14 bits of an FP8 product's sum. So they sum each 128 of K alone, and the results
are added up in float32 registers, where the scales of both operands are applied as well:

    y[r, n] = sum over blocks k of 128:  scale_x[r, k] * scale_w[e, n / 128, k] * (x[r, k] @ w[e, n, k])
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.ops.grouped_matmul import persistent
from moe.ops.grouped_matmul.persistent import WG_ROWS, Tiles, tile_table

BLOCK = 128  # of K and N: one scale
MULTIPLIERS, SLOTS = 3, 4  # with a third multiplier, the tensor cores work while the others add up
TILE_M = MULTIPLIERS * WG_ROWS


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
