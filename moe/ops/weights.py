"""Weights at rest in few bytes: FP8 in blocks of 128x128, or MXFP4. K is the axis that products sum over.

    fp8     1 byte and 1/4096: E4M3 with one float32 scale per block (arXiv 2412.19437, section 3.3)
    mxfp4   half a byte and 1/32: E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) with one power of two per 32
            values along K (OCP Microscaling Formats v1.0, sections 5.3 and 6.3)

Both hold inference weights: they have no gradient. `moe.ops.decode.few_rows` multiplies with them as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.errors import UserError
from moe.ops import fp8

GROUP = 32  # values along K that share a scale in MXFP4
NAN = 255  # the one E8M0 code that is no power of two


class Fp8Weight(NamedTuple):
  """value: float8_e4m3fn [..., K, N]. scale: float32 [..., ceil(K / 128), ceil(N / 128)]."""

  value: jax.Array
  scale: jax.Array


class Mxfp4Weight(NamedTuple):
  """packed: uint8 [..., K / 2, N], row 2k in the low nibble. scale: uint8 [..., K / 32, N], for 2^(scale - 127)."""

  packed: jax.Array
  scale: jax.Array


Weight = jax.Array | Fp8Weight | Mxfp4Weight


def quantize(w: jax.Array, kind: str) -> Fp8Weight | Mxfp4Weight:
  """Rounds matrices w [..., K, N] to `kind`, 'fp8' or 'mxfp4'.

  Raises:
    UserError: K is no multiple of 32, for mxfp4.
  """
  if kind == 'fp8':
    return Fp8Weight(*fp8.quantize(w, fp8.BLOCKS))
  *lead, K, N = w.shape
  if K % GROUP:
    raise UserError(f'MXFP4 weight of shape {w.shape}: axis -2 must be a multiple of {GROUP}, not {K}')
  groups = w.astype(jnp.float32).reshape(*lead, K // GROUP, GROUP, N)
  exponent = lax.bitcast_convert_type(jnp.abs(groups).max(-2), jnp.int32) >> 23  # floor(log2), biased, and exact
  scale = jnp.where(exponent == 255, NAN, jnp.clip(exponent - 2, 0))  # the largest power of two in E2M1 is 2^2
  code = _e2m1(groups * _power_of_two(254 - scale)[..., None, :]).reshape(*lead, K // 2, 2, N)
  return Mxfp4Weight(code[..., 0, :] | code[..., 1, :] << 4, scale.astype(jnp.uint8))


def dequantize(w: Weight, dtype) -> jax.Array:
  """The matrices [..., K, N] in `dtype`: quantised ones decoded, arrays cast."""
  if isinstance(w, Fp8Weight):
    return fp8.dequantize(fp8.Quantized(*w), fp8.BLOCKS).astype(dtype)
  if isinstance(w, Mxfp4Weight):
    pairs = jnp.stack([decode(w.packed, high=False), decode(w.packed, high=True)], -2).astype(jnp.float32)
    scale = decode_scale(w.scale).repeat(GROUP, -2)
    return (pairs.reshape(scale.shape) * DECODED * scale).astype(dtype)
  return w.astype(dtype)


def shape_of(w: Weight) -> tuple[int, ...]:
  """[..., K, N] of the matrices that w stands for."""
  if isinstance(w, Mxfp4Weight):
    *lead, half, N = w.packed.shape
    return *lead, 2 * half, N
  return w.value.shape if isinstance(w, Fp8Weight) else w.shape


DECODED = 2.0**14  # what `decode` is to be multiplied by


def decode(packed, high: bool):
  """float16 of each byte's low or high nibble, times 2^-14: E2M1's bits, moved to where float16 has the same ones.

  Subnormal codes become subnormal float16, so no code is a special case. For kernels, too.
  """
  bits = packed.astype(jnp.uint16)
  bits = ((bits & 0x70) << 5 | (bits & 0x80) << 8) if high else ((bits & 0x07) << 9 | (bits & 0x08) << 12)
  return lax.bitcast_convert_type(bits, jnp.float16)


def decode_scale(scale):
  """float32 of E8M0 codes; infinity for 255, which makes NaN or infinity of all it scales. For kernels, too."""
  return _power_of_two(scale.astype(jnp.int32))


def _power_of_two(biased):
  """float32 2^(biased - 127), biased in [0, 255): by its bits, since exp2 is not exact."""
  return lax.bitcast_convert_type(jnp.maximum(biased << 23, 1 << 22), jnp.float32)  # 2^-127 is subnormal


def _e2m1(scaled):
  """uint8 codes of the nearest values, ties to even codes, saturating."""
  size = jnp.abs(scaled)
  over = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5)
  return sum(o.astype(jnp.uint8) for o in over) | jnp.signbit(scaled).astype(jnp.uint8) << 3
