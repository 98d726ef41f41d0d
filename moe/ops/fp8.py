"""Matmuls in FP8 with block scales, as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3).

A layer y = x w is three products, each summed over another axis:

    Fprop   y  = x w        over the input width
    Dgrad   dx = dy w^T     over the output width
    Wgrad   dw = x^T dy     over tokens

E4M3 has 3 bits of mantissa and reaches from 2^-9 to 448, so whoever rounds to it must first scale to its range. One
scale per tensor lets a single outlier push the rest below 2^-9; so scales belong to small blocks, and each block's
largest value becomes 448:

    activations and gradients   1 x 128 along the axis that is summed over: each token has its own scale
    weights                     128 x 128: the same blocks serve Fprop and, transposed, Dgrad

Scales are made anew from the values at hand (online), so there is no history to keep or to restore. They differ along
the axis of the sum, so each 128 of it is summed alone, multiplied by both scales and added in float32, which also mends
the 14 bits of Hopper's FP8 sums. With Gaussian operands a product comes out 3.7% off (Frobenius), by rounding alone.

Fprop and Dgrad run in FP8. x is kept for the backward pass in FP8, at half the memory of bf16. Wgrad multiplies that x,
dequantised, by dy in the compute dtype: in FP8 it would need x and dy quantised once more, along tokens. Rows on their
way to experts of other shards are FP8, too, with scales that are powers of two (`model/dispatch/wire.py`). Router,
norms, embedding, head, the core of attention, masters and moments never are FP8.

On Hopper GPUs the products are the kernels of `grouped_matmul/mosaic_gpu_fp8.py`. Elsewhere the same numbers are
emulated: dequantised to float32 and multiplied there, which is also the kernels' oracle.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.ops import quantize_gpu
from moe.ops.grouped_matmul import BACKENDS, ROW_MULTIPLES, SAVED, mosaic_gpu_fp8
from moe.ops.grouped_matmul.persistent import pad_to_multiples
from moe.ops.quantize_gpu import BLOCK
from moe.ops.varying import align

ROWS, BLOCKS = (1, BLOCK), (BLOCK, BLOCK)  # rows and columns that share a scale


class Quantized(NamedTuple):
  """value: float8_e4m3fn [..., R, C]. scale: float32, one per block: [..., ceil(R / rows), ceil(C / columns)]."""

  value: jax.Array
  scale: jax.Array


def quantize(x: jax.Array, block: tuple[int, int], power_of_two: bool = False) -> Quantized:
  """Rounds the last two axes of `x` to FP8, in blocks of (rows, columns) that share scale = max(amax, 1e-4) / 448.

  Args:
    x: [..., R, C]; R and C need not be multiples of the block.
    block: such as ROWS, BLOCKS or (128, 1).
    power_of_two: round scales up to powers of two, so that scaling changes exponents only.
  """
  amax = jnp.abs(_in_blocks(x, block).astype(jnp.float32)).max((-3, -1))
  scale = quantize_gpu.scale_of(amax, power_of_two)
  return Quantized(quantize_gpu.rounded(x.astype(jnp.float32) / _spread(scale, block, x.shape)), scale)


def dequantize(x: Quantized, block: tuple[int, int]) -> jax.Array:
  """float32 values."""
  # Without the barrier XLA takes rounding to FP8 and back for excess of care, and leaves both out.
  return lax.optimization_barrier(x.value).astype(jnp.float32) * _spread(x.scale, block, x.value.shape)


def _in_blocks(x, block):
  """[..., R / rows, rows, C / columns, columns], padded with zeros."""
  x = pad_to_multiples(x, *[1] * (x.ndim - 2), *block)
  (*lead, R, C), (rows, columns) = x.shape, block
  return x.reshape(*lead, R // rows, rows, C // columns, columns)


def _spread(scale, block, shape):
  """Each element's scale."""
  return scale.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]


def grouped_matmul(
  x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array, backend: str, power_of_two: bool = False
) -> jax.Array:
  """`moe.ops.grouped_matmul.grouped_matmul` in FP8.

  Args:
    x_MD: rows sorted by expert, in the compute dtype, as is the result.
    w_eDF: a matrix per expert.
    size_e: int32 rows per expert, multiples of the backend's ROW_MULTIPLES.
    backend: a key of BACKENDS; all but mosaic_gpu emulate.
    power_of_two: scales of rows are powers of two: rows that came in FP8 with such are not rounded once more.
  """
  (rows, _), F = x_MD.shape, w_eDF.shape[2]
  if backend == 'mosaic_gpu':
    x_MD = pad_to_multiples(x_MD, ROW_MULTIPLES[backend], BLOCK)
    w_eDF = pad_to_multiples(w_eDF, 1, BLOCK, BLOCK)
  return _grouped(*align(x_MD, w_eDF, size_e), backend, power_of_two)[:rows, :F]


def matmul(x: jax.Array, w_DF: jax.Array, backend: str) -> jax.Array:
  """x [..., D] times w, in FP8: one expert that gets all rows."""
  x_MD = x.reshape(-1, x.shape[-1])
  padded_MD = pad_to_multiples(x_MD, ROW_MULTIPLES[backend], 1)
  y_MF = grouped_matmul(padded_MD, w_DF[None], jnp.array([len(padded_MD)]), backend)
  return y_MF[: len(x_MD)].reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x_MD, w_eDF, size_e, backend, power_of_two):
  return _grouped_forward(x_MD, w_eDF, size_e, backend, power_of_two)[0]


def _grouped_forward(x_MD, w_eDF, size_e, backend, power_of_two):
  x, (w, contracted_last) = quantize_rows(x_MD, backend, power_of_two), quantize_matrices(w_eDF, backend)
  y_MF = product(x, contracted_last, size_e, backend, x_MD.dtype)
  x, w, y_MF = checkpoint_name((x, w, y_MF), SAVED)
  return y_MF, (x, w, size_e, jnp.zeros((0,), w_eDF.dtype))


def _grouped_backward(backend, power_of_two, saved, dy_MF):
  x, w, size_e, like_w = saved
  dx_MD = product(quantize_rows(dy_MF, backend, power_of_two), w, size_e, backend, dy_MF.dtype)
  x_MD = dequantize(x, ROWS).astype(dy_MF.dtype)
  of_w = lambda w_eDF: BACKENDS[backend](x_MD, w_eDF, size_e)
  (dw_eDF,) = jax.vjp(of_w, w.value.astype(like_w.dtype))[1](dy_MF)  # of the vjp, only the weights' product is run
  return dx_MD, dw_eDF, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def quantize_rows(x_MK: jax.Array, backend: str, power_of_two: bool = False) -> Quantized:
  """In ROWS, by one kernel if the backend is mosaic_gpu; K is a multiple of BLOCK then."""
  if backend == 'mosaic_gpu':
    return Quantized(*quantize_gpu.rows(x_MK, power_of_two))
  return quantize(x_MK, ROWS, power_of_two)


def quantize_matrices(w_eKN: jax.Array, backend: str) -> tuple[Quantized, Quantized]:
  """Matrices in BLOCKS, and the same as [e, N, K]: the tensor cores take FP8 with the axis of the sum last only."""
  if backend == 'mosaic_gpu':
    value, turned, scale = quantize_gpu.matrices(w_eKN)
  else:
    value, scale = quantize(w_eKN, BLOCKS)
    turned = value.swapaxes(1, 2)
  return Quantized(value, scale), Quantized(turned, scale.swapaxes(1, 2))


def product(x: Quantized, w: Quantized, size_e: jax.Array, backend: str, dtype) -> jax.Array:
  """The grouped product, in `dtype`, of rows x [M, K] in ROWS and matrices w [e, N, K] in BLOCKS."""
  if backend == 'mosaic_gpu':
    return mosaic_gpu_fp8.rows_by_matrix(x.value, x.scale, w.value, w.scale, size_e, dtype)
  w_eKN = dequantize(w, BLOCKS).swapaxes(1, 2)
  return BACKENDS[backend](dequantize(x, ROWS), w_eKN, size_e).astype(dtype)
