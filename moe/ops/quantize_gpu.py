"""Quantisation to FP8 on GPUs: Pallas kernels, compiled by Triton, that read and write everything once.

Left to XLA, the largest values are one pass over memory, the rounding a second, and a transposed copy a third.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe.ops.triton_call import call

FP8 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FP8).max)  # 448
BLOCK = 128
TILE = 8192  # elements of a program of `rows`


def rows(x_MK: jax.Array, power_of_two: bool, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(FP8 values [M, K], float32 scales [M, K / 128]) in blocks of 1 x 128; K is a multiple of 128."""
  M, K = x_MK.shape
  columns = math.gcd(K, TILE // 8)
  tile_rows = math.gcd(M, TILE // columns)
  spec = lambda width: pl.BlockSpec((tile_rows, width), lambda i, j: (i, j))
  outs = [((M, K), FP8, spec(columns)), ((M, K // BLOCK), jnp.float32, spec(columns // BLOCK))]
  grid = M // tile_rows, K // columns
  kernel = functools.partial(_rows_kernel, power_of_two=power_of_two)
  return tuple(call(kernel, grid, (x_MK,), [spec(columns)], outs, warps=4, stages=1, interpret=interpret))


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
  return tuple(call(_matrices_kernel, grid, (w_eKN,), [block(False)], outs, warps=8, stages=1, interpret=interpret))


def _rows_kernel(x, value, scale, power_of_two):
  tile = x[...].astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
  scales = scale_of(jnp.abs(tile).max(-1), power_of_two)
  scale[...] = scales
  value[...] = rounded(tile / scales[..., None]).reshape(x.shape)


def _matrices_kernel(w, value, turned, scale):
  tile = w[...].astype(jnp.float32)
  scales = scale_of(jnp.abs(tile).max(0, keepdims=True).max(1, keepdims=True))
  scale[...] = scales
  result = rounded(tile / scales)
  value[...] = result
  turned[...] = result.T


def scale_of(amax, power_of_two: bool = False):
  """float32 scale of a block whose largest value is `amax`, rounded up to a power of two if wished."""
  scale = jnp.maximum(amax, 1e-4) / LARGEST
  if not power_of_two:
    return scale
  # On the bits, since exp2 and log2 are not exact: any mantissa carries into the exponent, and is cleared.
  bits = lax.bitcast_convert_type(scale, jnp.int32) + 0x7FFFFF
  return lax.bitcast_convert_type(bits & ~0x7FFFFF, jnp.float32)


def rounded(scaled):
  """FP8 of values that were divided by their scale. The cast alone does not saturate: it would make NaN."""
  return jnp.clip(scaled, -LARGEST, LARGEST).astype(FP8)
