"""Matmuls in FP8 with block scales, as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3).

A layer y = x w is three products, each summed over another axis:

    Fprop   y  = x w        over the input width
    Dgrad   dx = dy w^T     over the output width
    Wgrad   dw = x^T dy     over tokens

E4M3 has 3 bits of mantissa and reaches from 2^-9 to 448, so whoever rounds to it must first scale to its range. One
scale per tensor lets a single outlier push the rest below 2^-9; so scales belong to small blocks, and each block's
largest value becomes 448:

    activations and gradients   1 x 128 along the axis that is summed over: each token has its own scale in Fprop and
                                Dgrad, and each channel of 128 tokens of one expert in Wgrad
    weights                     128 x 128: the same blocks serve Fprop and, transposed, Dgrad

Scales are made anew from the values at hand (online), so there is no history to keep or to restore. They differ along
the axis of the sum, so each 128 of it is summed alone, multiplied by both scales and added in float32, which also mends
the 14 bits of Hopper's FP8 sums. With Gaussian operands a product comes out 3.7% off (Frobenius), by rounding alone.

Fprop and Dgrad run in FP8. x is kept for the backward pass in FP8, at half the memory of bf16. So does Wgrad where it
pays (`wgrad_pays`): it wants x and dy quantised once more, along tokens, and with tokens last ("turned"). x is turned
from what was kept, so it is rounded twice; with scales that are powers of two the second rounding only meets values
that become subnormal, and dw of Gaussian operands is 3.8% off instead of 4.5%. Elsewhere Wgrad multiplies the kept x,
dequantised, by dy in the compute dtype. Rows on their way to experts of other shards are FP8, too, with scales that are
powers of two (`model/dispatch/_wire.py`). Router, norms, embedding, head, the core of attention, masters and moments
never are FP8.

On Hopper GPUs the products are the kernels of `grouped_matmul/_mosaic_gpu_fp8.py`. Elsewhere the same numbers are
emulated: dequantised to float32 and multiplied there, which is also the kernels' oracle.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.ops import quantize_gpu
from moe.ops.grouped_matmul import SAVED, multiply
from moe.ops.grouped_matmul import _mosaic_gpu_fp8 as mosaic_gpu_fp8
from moe.ops.grouped_matmul._persistent import pad_to_multiples
from moe.ops.quantize_gpu import BLOCK, Blocks, blocks_of
from moe.ops.varying import align, vary, varying_axes
from moe.registry import GROUPED_MATMULS

ROWS, COLUMNS, BLOCKS = (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)  # rows and columns that share a scale
# Measured on one H200 (bench.py --suite=gemm, --suite=fp8): Wgrad; quantising as is, turning x, dy both ways.
BF16_FLOP_PER_S, FP8_FLOP_PER_S = 0.6e15, 0.8e15
AS_IS_BYTES_PER_S, TURN_BYTES_PER_S, BOTH_WAYS_BYTES_PER_S = 3.3e12, 1.3e12, 2.0e12


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
    size_e: int32 rows per expert, multiples of the backend's row_multiple.
    backend: of `moe.ops.grouped_matmul`; all but mosaic_gpu emulate.
    power_of_two: scales of rows are powers of two: rows that came in FP8 with such are not rounded once more. With
      Wgrad in FP8 they always are.
  """
  (rows, _), F = x_MD.shape, w_eDF.shape[2]
  wgrad_in_fp8 = wgrad_pays(rows, *w_eDF.shape)
  if backend == 'mosaic_gpu':
    x_MD = pad_to_multiples(x_MD, GROUPED_MATMULS[backend].row_multiple, BLOCK)
    w_eDF = pad_to_multiples(w_eDF, 1, BLOCK, BLOCK)
  operands = align(x_MD, w_eDF, size_e)
  return _grouped(*operands, backend, power_of_two or wgrad_in_fp8, wgrad_in_fp8)[:rows, :F]


def wgrad_pays(rows: int, experts: int, D: int, F: int) -> bool:
  """Whether a Hopper GPU gains more by multiplying x^T dy in FP8 than it loses by turning x and dy.

  Decided by shapes alone, so that emulation rounds as the kernels do.

  Args:
    rows: of all experts, M.
    experts: matrices, e.
    D, F: columns of x and of dy.
  """
  written_s = experts * D * F * 2 / AS_IS_BYTES_PER_S  # with few rows per expert, writing dw is what takes long
  product_s = lambda flop_per_s: max(2 * rows * D * F / flop_per_s, written_s)
  # x: one byte read and one written instead of one and two. dy: two read and two written instead of two and one.
  turning_s = rows * (2 * D / TURN_BYTES_PER_S + 4 * F / BOTH_WAYS_BYTES_PER_S)
  not_turning_s = rows * (3 * D + 3 * F) / AS_IS_BYTES_PER_S
  return product_s(BF16_FLOP_PER_S) - product_s(FP8_FLOP_PER_S) > turning_s - not_turning_s


def matmul(x: jax.Array, w_DF: jax.Array, backend: str) -> jax.Array:
  """x [..., D] times w, in FP8: one expert that gets all rows."""
  x_MD = x.reshape(-1, x.shape[-1])
  padded_MD = pad_to_multiples(x_MD, GROUPED_MATMULS[backend].row_multiple, 1)
  y_MF = grouped_matmul(padded_MD, w_DF[None], jnp.array([len(padded_MD)]), backend)
  return y_MF[: len(x_MD)].reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped(x_MD, w_eDF, size_e, backend, power_of_two, wgrad_in_fp8):
  return _grouped_forward(x_MD, w_eDF, size_e, backend, power_of_two, wgrad_in_fp8)[0]


def _grouped_forward(x_MD, w_eDF, size_e, backend, power_of_two, wgrad_in_fp8):
  del wgrad_in_fp8
  x, (w, contracted_last) = quantize_rows(x_MD, backend, power_of_two), quantize_matrices(w_eDF, backend)
  y_MF = product(x, contracted_last, size_e, backend, x_MD.dtype)
  x, w, y_MF = checkpoint_name((x, w, y_MF), SAVED)
  return y_MF, (x, w, size_e, jnp.zeros((0,), w_eDF.dtype))


def _grouped_backward(backend, power_of_two, wgrad_in_fp8, saved, dy_MF):
  x, w, size_e, like_w = saved
  if wgrad_in_fp8:
    blocks = blocks_of(size_e, len(dy_MF))
    dy, dy_turned = quantize_both_ways(dy_MF, blocks, backend)
    dw_eDF = product_of_turned(turn(x, blocks, backend), dy_turned, blocks, backend, like_w.dtype)
  else:
    dy = quantize_rows(dy_MF, backend, power_of_two)
    dw_eDF = _weight_gradient(dequantize(x, ROWS).astype(dy_MF.dtype), dy_MF, size_e, backend, like_w.dtype)
  return product(dy, w, size_e, backend, dy_MF.dtype), dw_eDF, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _weight_gradient(x_MD, dy_MF, size_e, backend, dtype):
  """dw of a backend of `grouped_matmul`, of whose vjp only the weights' product is run."""
  w_eDF = vary(jnp.zeros((len(size_e), x_MD.shape[1], dy_MF.shape[1]), dtype), varying_axes(x_MD))
  return jax.vjp(lambda w_eDF: multiply(x_MD, w_eDF, size_e, backend), w_eDF)[1](dy_MF)[0]


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


def turn(x: Quantized, blocks: Blocks, backend: str) -> Quantized:
  """Rows in ROWS as values [K, B * 128], tokens last, and scales [B, K], powers of two; see `quantize_gpu.Blocks`."""
  if backend == 'mosaic_gpu':
    return Quantized(*quantize_gpu.turned(x.value, x.scale, blocks))
  return _turned(dequantize(x, ROWS), blocks)


def quantize_both_ways(x_MK: jax.Array, blocks: Blocks, backend: str) -> tuple[Quantized, Quantized]:
  """In ROWS, with powers of two, and turned; rows of no block are unspecified."""
  if backend == 'mosaic_gpu':
    value, scale, *turned = quantize_gpu.both_ways(x_MK, blocks)
    return Quantized(value, scale), Quantized(*turned)
  return quantize(x_MK, ROWS, power_of_two=True), _turned(x_MK, blocks)


def _turned(x_MK, blocks):
  row_BT = blocks.row_B[:, None] + jnp.arange(BLOCK)
  used_BT = jnp.arange(BLOCK) < blocks.rows_B[:, None]
  rows_BTK = jnp.where(used_BT[..., None], x_MK.at[row_BT].get(mode='clip'), 0)
  value, scale = quantize(rows_BTK.reshape(-1, x_MK.shape[1]), COLUMNS, power_of_two=True)
  return Quantized(value.T, scale)


def product_of_turned(x: Quantized, dy: Quantized, blocks: Blocks, backend: str, dtype) -> jax.Array:
  """dw [e, D, F] in `dtype`: x dy^T over each expert's blocks, of operands that `turn` made.

  Args:
    x, dy: FP8 values [D, B * 128] and [F, B * 128] with scales [B, D] and [B, F].
    blocks: the expert of each 128 columns.
    backend: of `moe.ops.grouped_matmul`.
    dtype: of the result.
  """
  if backend == 'mosaic_gpu':
    return mosaic_gpu_fp8.rows_by_rows(*x, *dy, blocks.first_e, blocks.count_e, dtype)
  x_MD, dy_MF = (dequantize(Quantized(a.value.T, a.scale), COLUMNS) for a in (x, dy))
  return _weight_gradient(x_MD, dy_MF, blocks.count_e * BLOCK, backend, jnp.float32).astype(dtype)


def product(x: Quantized, w: Quantized, size_e: jax.Array, backend: str, dtype) -> jax.Array:
  """The grouped product, in `dtype`, of rows x [M, K] in ROWS and matrices w [e, N, K] in BLOCKS.

  Args:
    x: quantised rows, sorted by expert.
    w: quantised matrices, transposed.
    size_e: int32 rows per expert.
    backend: of `moe.ops.grouped_matmul`.
    dtype: of the result, [M, N].
  """
  if backend == 'mosaic_gpu':
    return mosaic_gpu_fp8.rows_by_matrix(x.value, x.scale, w.value, w.scale, size_e, dtype)
  w_eKN = dequantize(w, BLOCKS).swapaxes(1, 2)
  return multiply(dequantize(x, ROWS), w_eKN, size_e, backend).astype(dtype)
