"""Quantisation to FP8 on GPUs: Pallas kernels, compiled by Triton, that read and write everything once.

Left to XLA, the largest values are one pass over memory, the rounding a second, and a transposed copy a third.

For sums over tokens, rows are turned: tokens last, in blocks of 128 tokens of one expert each, with a scale per block
and channel. As rows that are turned were or will be rounded along channels as well, scales are powers of two there.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.permute import key_of, padded_rows
from moe.ops.triton_call import call

FP8 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FP8).max)  # 448
BLOCK = 128
TILE = 8192  # elements of a program of `rows`


class Blocks(NamedTuple):
  """Blocks of BLOCK tokens of one expert each; the last of an expert is filled up.

  row_B, rows_B: int32 first row of each block and how many rows it has, 0 past the last block.
  first_e, count_e: int32 first block of each expert and how many it has.
  """

  row_B: jax.Array
  rows_B: jax.Array
  first_e: jax.Array
  count_e: jax.Array


def blocks_of(size_e: jax.Array, rows: int) -> Blocks:
  """Cuts each expert's rows, consecutive and at most `rows` together, into blocks."""
  count_e = -(-size_e // BLOCK)
  end_e = jnp.cumsum(count_e)
  block_B = jnp.arange(padded_rows(rows, len(size_e), BLOCK) // BLOCK)
  expert_B = jnp.minimum(key_of(block_B, end_e), len(size_e) - 1)
  inside_B = (block_B - (end_e - count_e)[expert_B]) * BLOCK
  row_B = (jnp.cumsum(size_e) - size_e)[expert_B] + inside_B
  rows_B = jnp.clip(size_e[expert_B] - inside_B, 0, BLOCK)
  return Blocks(*(a.astype(jnp.int32) for a in (row_B, rows_B, end_e - count_e, count_e)))


def rows(x_MK: jax.Array, power_of_two: bool, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(FP8 values [M, K], float32 scales [M, K / 128]) in blocks of 1 x 128; K is a multiple of 128."""
  M, K = x_MK.shape
  columns = math.gcd(K, TILE // 8)
  tile_rows = math.gcd(M, TILE // columns)
  spec = lambda width: pl.BlockSpec((tile_rows, width), lambda i, j: (i, j))
  outs = [((M, K), FP8, spec(columns)), ((M, K // BLOCK), jnp.float32, spec(columns // BLOCK))]
  grid = M // tile_rows, K // columns
  kernel = functools.partial(_rows_kernel, power_of_two=power_of_two)
  value, scale = call(kernel, grid, (x_MK,), [spec(columns)], outs, warps=4, stages=1, interpret=interpret)
  return value, scale


def turned(value_MK, scale_MA, blocks: Blocks, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Rows that `rows` made: (FP8 values [K, B * 128], float32 scales [B, K]) in blocks of 128 tokens x 1 channel.

  What lies past the last block is zeros.

  Args:
    value_MK: FP8, from `rows`.
    scale_MA: float32 scales of 128 columns each, A = K / 128: powers of two.
    blocks: of the rows.
    interpret: run by jnp instead, on any platform.
  """
  whole, scales, outs = _specs(value_MK, blocks)
  operands = (value_MK, scale_MA.T)
  return tuple(_over_blocks(_turned_kernel, blocks, operands, [whole, scales], outs, interpret))


def both_ways(x_MK, blocks: Blocks, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """x quantised twice in one kernel: by rows with scales of powers of two, as `rows` does it, and by columns.

  The second half is laid out as the result of `turned`, but made from x and not from values that are rounded already.
  Rows of no block are unspecified.
  """
  (M, K), (whole, scales, outs) = x_MK.shape, _specs(x_MK, blocks)
  outs = [((M, K), FP8, whole), ((K // BLOCK, M), jnp.float32, scales), *outs]
  value, scale_AM, *rest = _over_blocks(_both_ways_kernel, blocks, (x_MK,), [whole], outs, interpret)
  return value, scale_AM.T, *rest


def _specs(x_MK, blocks):
  """BlockSpecs of 128 columns of all rows, and of their scales; `outs` of what is turned."""
  (M, K), (B,) = x_MK.shape, blocks.row_B.shape
  turned = ((K, B * BLOCK), FP8, pl.BlockSpec((BLOCK, BLOCK), lambda k, b: (k, b)))
  turned_scale = ((B, K), jnp.float32, pl.BlockSpec((None, BLOCK), lambda k, b: (b, k)))
  whole, scales = pl.BlockSpec((M, BLOCK), lambda k, b: (0, k)), pl.BlockSpec((None, M), lambda k, b: (k, 0))
  return whole, scales, [turned, turned_scale]


def _over_blocks(kernel, blocks, operands, specs, outs, interpret):
  """Runs a program per 128 columns and block, neighbours in rows' memory first."""
  B, K = outs[-1][0]
  one = pl.BlockSpec((1,), lambda k, b: (b,))
  operands, specs = (blocks.row_B, blocks.rows_B, *operands), [one, one, *specs]
  return call(kernel, (K // BLOCK, B), operands, specs, outs, warps=8, stages=1, interpret=interpret)


def matrices(w_eKN: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(FP8 values [e, K, N], the same transposed [e, N, K], scales [e, K / 128, N / 128]) in blocks of 128 x 128."""
  e, K, N = w_eKN.shape
  block = lambda turned: pl.BlockSpec((None, BLOCK, BLOCK), lambda i, k, n: (i, n, k) if turned else (i, k, n))
  one = pl.BlockSpec((None, 1, 1), lambda i, k, n: (i, k, n))
  outs = [
    ((e, K, N), FP8, block(False)),
    ((e, N, K), FP8, block(True)),
    ((e, K // BLOCK, N // BLOCK), jnp.float32, one),
  ]
  grid = e, K // BLOCK, N // BLOCK
  specs = [block(False)]
  value, turned, scale = call(_matrices_kernel, grid, (w_eKN,), specs, outs, warps=8, stages=1, interpret=interpret)
  return value, turned, scale


def _rows_kernel(x, value, scale, power_of_two):
  tile = x[...].astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
  scales = scale_of(jnp.abs(tile).max(-1), power_of_two)
  scale[...] = scales
  value[...] = rounded(tile / scales[..., None]).reshape(x.shape)


def _turned_kernel(row, rows, value, scale, turned, turned_scale):
  tokens, used = _tokens(row, rows)
  scales = plt.load(scale.at[tokens], mask=used, other=0.0)
  tile = plt.load(value.at[tokens], mask=used[:, None], other=0.0).astype(jnp.float32)
  _turn(tile * scales[:, None], turned, turned_scale)


def _both_ways_kernel(row, rows, x, value, scale, turned, turned_scale):
  tokens, used = _tokens(row, rows)
  tile = plt.load(x.at[tokens], mask=used[:, None], other=0.0).astype(jnp.float32)
  scales = scale_of(jnp.abs(tile).max(1), power_of_two=True)
  plt.store(scale.at[tokens], scales, mask=used)
  plt.store(value.at[tokens], rounded(tile * inverse_of(scales)[:, None]), mask=used[:, None])
  _turn(tile, turned, turned_scale)


def _tokens(row, rows):
  """This program's rows: a slice of them, and which of it belong to the block."""
  return pl.ds(row[0], BLOCK), jnp.arange(BLOCK) < rows[0]


def _turn(tile, turned, turned_scale):
  scales = scale_of(jnp.abs(tile).max(0), power_of_two=True)
  turned_scale[...] = scales
  turned[...] = rounded(tile * inverse_of(scales)).T


def _matrices_kernel(w, value, turned, scale):
  tile = w[...].astype(jnp.float32)
  scales = scale_of(jnp.abs(tile).max(0, keepdims=True).max(1, keepdims=True))
  scale[...] = scales
  result = rounded(tile / scales)
  value[...] = result
  turned[...] = result.T


def scale_of(amax, power_of_two: bool = False):
  """float32 scale of a block whose largest value is `amax`, rounded up to a power of two if wished."""
  amax = jnp.maximum(amax, 1e-4)
  if not power_of_two:
    return amax / LARGEST
  # On the bits, since exp2, log2 and, on GPUs, division are not exact. LARGEST is 1.75 * 2^8: a mantissa above 1.75
  # carries into the exponent, and any is cleared.
  bits = lax.bitcast_convert_type(amax, jnp.int32) + 0x1FFFFF
  return lax.bitcast_convert_type(bits & ~0x7FFFFF, jnp.float32) * 2**-8


def inverse_of(scale):
  """Exactly 1 / scale of powers of two."""
  return lax.bitcast_convert_type(0x7F000000 - lax.bitcast_convert_type(scale, jnp.int32), jnp.float32)


def rounded(scaled):
  """FP8 of values that were divided by their scale. The cast alone does not saturate: it would make NaN.

  NaN stays NaN, which after `jnp.clip` it does not on GPUs.
  """
  return jnp.where(scaled > LARGEST, LARGEST, jnp.where(scaled < -LARGEST, -LARGEST, scaled)).astype(FP8)
