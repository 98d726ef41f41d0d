"""Grouped matmul for Hopper GPUs (H20, H100, H200) in Pallas Mosaic GPU: bf16 operands, float32 sums.

Two kernels, built on `_persistent.py`:

    rows by matrix   y_MF = x_MD w_eDF    and    dx_MD = dy_MF w_eDF^T
    rows by rows     dw_eDF = x_MD^T dy_MF, per expert
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.ops.grouped_matmul import Backend
from moe.ops.grouped_matmul import _persistent as persistent
from moe.ops.grouped_matmul._persistent import ROW_MULTIPLE, TILE_M, WG_ROWS, Tiles, pad_to_multiples, tile_table

TILE_K, SLOTS = 64, 4
WIDTH_MULTIPLE = 64  # of D and F: the width of a swizzled row in shared memory


def matmul(x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array) -> jax.Array:
  """See `moe.ops.grouped_matmul.grouped_matmul`. bfloat16; all size_e are multiples of ROW_MULTIPLE.

  Widths that are no multiple of WIDTH_MULTIPLE are padded, at the cost of copies.
  """
  rows, F = len(x_MD), w_eDF.shape[2]
  x_MD = pad_to_multiples(x_MD, ROW_MULTIPLE, WIDTH_MULTIPLE)
  return _product(x_MD, pad_to_multiples(w_eDF, 1, WIDTH_MULTIPLE, WIDTH_MULTIPLE), size_e)[:rows, :F]


@jax.custom_vjp
def _product(x_MD, w_eDF, size_e):
  return _rows_by_matrix(x_MD, w_eDF, size_e, transpose=False)


def _forward(x_MD, w_eDF, size_e):
  return _product(x_MD, w_eDF, size_e), (x_MD, w_eDF, size_e)


def _backward(saved, dy_MF):
  x_MD, w_eDF, size_e = saved
  return _rows_by_matrix(dy_MF, w_eDF, size_e, transpose=True), _rows_by_rows(x_MD, dy_MF, size_e), None


_product.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames='transpose')  # lowered once for all products of a shape
def _rows_by_matrix(x_MK, w, size_e, transpose: bool):
  """y[r] = x[r] @ w[expert of r], or @ w[...]^T if `transpose`."""
  M, K = x_MK.shape
  N = w.shape[1 if transpose else 2]
  if not M:
    return persistent.zeros_like_kernel((M, N), x_MK.dtype, x_MK)
  tile_n = 256 if N > 128 else 128
  n_tiles, k_steps = pl.cdiv(N, tile_n), pl.cdiv(K, TILE_K)

  def body(count, expert, row, rows, x, w, y, ring_x, ring_w, out, full, empty):
    item = lambda i: persistent.tile_of(i, Tiles(count, expert, row, rows), n_tiles, tile_n)

    def load(info, k, slot, barrier):
      e, r, _, n = info
      plgpu.copy_gmem_to_smem(x.at[pl.ds(r, TILE_M), pl.ds(k * TILE_K, TILE_K)], ring_x.at[slot], barrier)
      w_k, w_n = pl.ds(k * TILE_K, TILE_K), pl.ds(n, tile_n)
      plgpu.copy_gmem_to_smem(w.at[(e, w_n, w_k) if transpose else (e, w_k, w_n)], ring_w.at[slot], barrier)

    def multiply(info, k, slot, acc, wg):
      del info, k
      tile_w = ring_w.at[slot].transpose((1, 0)) if transpose else ring_w.at[slot]
      plgpu.wgmma(acc, ring_x.at[slot, pl.ds(wg * WG_ROWS, WG_ROWS)], tile_w)

    def store(info, sums, wg):
      _, r, rows, n = info
      target = y.at[:, pl.ds(n, tile_n)]
      persistent.store_rows(sums, out.at[wg], target, r + wg * WG_ROWS, rows - wg * WG_ROWS)

    steps = lambda info: k_steps
    sums = _accumulator(steps, multiply, tile_n, full, empty)
    persistent.run(count[0] * n_tiles, item, steps, load, sums, store, SLOTS, full, empty)

  ring = {'x': ((TILE_M, TILE_K), x_MK.dtype), 'w': ((tile_n, TILE_K) if transpose else (TILE_K, tile_n), w.dtype)}
  return persistent.call(body, SLOTS, ring, (M, N), x_MK.dtype, *tile_table(size_e, M), x_MK, w)


@jax.jit
def _rows_by_rows(x_MD, dy_MF, size_e):
  """dw[e] = x^T dy over the rows of expert e."""
  (M, D), F, E = x_MD.shape, dy_MF.shape[1], len(size_e)
  if not M:
    return persistent.zeros_like_kernel((E, D, F), x_MD.dtype, x_MD)
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

      plgpu.wgmma(acc, tile_x.transpose((1, 0)), ring_dy.at[slot])

    def store(info, sums, wg):
      e, _, _, d, f = info
      persistent.store_rows(sums, out.at[wg], dw.at[e, :, pl.ds(f, tile_f)], d + wg * WG_ROWS, WG_ROWS)

    k_steps = lambda info: (info[1] + TILE_K - 1) // TILE_K
    sums = _accumulator(k_steps, multiply, tile_f, full, empty)
    persistent.run(E * d_tiles * f_tiles, item, k_steps, load, sums, store, SLOTS, full, empty)

  start_e = (jnp.cumsum(size_e) - size_e).astype(jnp.int32)
  ring = {'x': ((TILE_K, TILE_M), x_MD.dtype), 'dy': ((TILE_K, tile_f), dy_MF.dtype)}
  return persistent.call(body, SLOTS, ring, (E, D, F), x_MD.dtype, size_e, start_e, x_MD, dy_MF)


def _accumulator(k_steps, multiply, columns: int, full, empty):
  """The `multiply` of `persistent.run` that sums products in one accumulator, a step ahead of its release."""

  def sums(info, first, wg):
    def over_k(acc):
      def per_k(k, _):
        plgpu.barrier_wait(full.at[lax.rem(first + k, SLOTS)])
        multiply(info, k, lax.rem(first + k, SLOTS), acc, wg)
        plgpu.wgmma_wait(1)

        @pl.when(k > 0)  # the product before this one is done with its slot
        def release():
          plgpu.barrier_arrive(empty.at[lax.rem(first + k - 1, SLOTS)])

      lax.fori_loop(0, k_steps(info), per_k, None)
      return acc[...]

    result = pl.run_scoped(over_k, plgpu.ACC((WG_ROWS, columns), jnp.float32))

    @pl.when(k_steps(info) > 0)
    def _():
      plgpu.barrier_arrive(empty.at[lax.rem(first + k_steps(info) - 1, SLOTS)])

    return result

  return sums


BACKEND = Backend(matmul, ROW_MULTIPLE, only_on=('hopper', 'bfloat16'))
