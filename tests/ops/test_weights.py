"""Quantised weights against ml_dtypes' number formats, loops over blocks, and the OCP specification's numbers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from moe.errors import UserError
from moe.ops import weights
from moe.ops.weights import Fp8Weight, Mxfp4Weight

GAUSSIAN = np.random.default_rng(0).normal(size=(2, 64, 10)).astype(np.float32)
WIDE = GAUSSIAN * np.exp2(np.random.default_rng(1).integers(-60, 60, GAUSSIAN.shape)).astype(np.float32)


def codes_of(packed):
  """[..., K / 2, N] bytes to [..., K, N] codes, by a loop."""
  packed = np.asarray(packed)
  codes = np.empty((*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]), np.uint8)
  for k in range(packed.shape[-2]):
    codes[..., 2 * k, :], codes[..., 2 * k + 1, :] = packed[..., k, :] % 16, packed[..., k, :] // 16
  return codes


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('w', [GAUSSIAN, WIDE, 0 * GAUSSIAN, -7.9 * np.ones_like(GAUSSIAN)])
def test_mxfp4_is_bit_exact(w, jit):
  """Scales by numpy's float64 log2, codes by ml_dtypes' rounding, values by its E8M0 and E2M1."""
  quantize = jax.jit(weights.quantize, static_argnums=1) if jit else weights.quantize
  quantized = quantize(jnp.asarray(w), 'mxfp4')
  amax = np.abs(w.reshape(2, 2, 32, 10)).max(2).astype(np.float64)
  exponent = np.where(amax > 0, np.floor(np.log2(np.where(amax > 0, amax, 1))) - 2, -127)
  np.testing.assert_array_equal(quantized.scale, exponent + 127)
  scale = np.asarray(quantized.scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, 1)
  expected = np.clip(w / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
  codes = codes_of(quantized.packed)
  np.testing.assert_array_equal(codes, expected.view(np.uint8))
  values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
  np.testing.assert_array_equal(np.asarray(weights.dequantize(quantized, jnp.float32)), values)
  assert weights.shape_of(quantized) == w.shape


def test_mxfp4_rounds_ties_to_even_and_saturates():
  """All midpoints between two values, and what lies past the largest; the first value makes the scale 1."""
  given = np.zeros((32, 1), np.float32)
  given[:16, 0] = [7.99, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -7.99]
  values = weights.dequantize(weights.quantize(jnp.asarray(given), 'mxfp4'), jnp.float32)
  rounded = [6, 0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -6]
  np.testing.assert_array_equal(np.asarray(values)[:16, 0], rounded)


def test_every_code_and_scale_of_mxfp4_decodes():
  packed = jnp.asarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
  every = np.arange(256, dtype=np.uint8)
  low, high = (every % 16).view(ml_dtypes.float4_e2m1fn), (every // 16).view(ml_dtypes.float4_e2m1fn)
  for nibble, is_high in ((low, False), (high, True)):
    decoded = np.asarray(weights.decode(packed, is_high), np.float32).ravel() * weights.DECODED
    np.testing.assert_array_equal(decoded, nibble.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(nibble.astype(np.float32)))
  scales = np.arange(255, dtype=np.uint8)
  decoded = np.asarray(weights.decode_scale(jnp.asarray(scales)))
  np.testing.assert_array_equal(decoded, scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
  w = GAUSSIAN.copy()
  w[0, 3, 4] = bad
  values = np.asarray(weights.dequantize(weights.quantize(jnp.asarray(w), 'mxfp4'), jnp.float32))
  assert not np.isfinite(values[0, 3, 4])
  assert np.isfinite(np.delete(values, 4, 2)).all()


@pytest.mark.parametrize('shape', [(2, 300, 200), (100, 20), (1, 2, 128, 256)])
def test_fp8_equals_loops_over_blocks(shape):
  w = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  quantized = jax.jit(weights.quantize, static_argnums=1)(jnp.asarray(w), 'fp8')
  assert quantized.value.dtype == jnp.float8_e4m3fn
  assert weights.shape_of(quantized) == shape
  values = np.asarray(weights.dequantize(quantized, jnp.float32))
  scales = np.asarray(quantized.scale).reshape(-1, *quantized.scale.shape[-2:])
  for matrix, (value, scale) in enumerate(zip(values.reshape(-1, *shape[-2:]), scales, strict=True)):
    expected, scale_expected = oracle.quantize(w.reshape(-1, *shape[-2:])[matrix], 128, 128, False)
    np.testing.assert_allclose(scale, scale_expected, rtol=2e-7)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=0)


def test_quantised_weights_are_pytrees_and_arrays_are_cast():
  quantized = weights.quantize(jnp.asarray(GAUSSIAN), 'mxfp4')
  one = jax.tree.map(lambda a: a[1], quantized)
  assert isinstance(one, Mxfp4Weight)
  np.testing.assert_array_equal(weights.dequantize(one, jnp.float32), weights.dequantize(quantized, jnp.float32)[1])
  assert isinstance(weights.quantize(jnp.asarray(GAUSSIAN), 'fp8'), Fp8Weight)
  cast = weights.dequantize(jnp.asarray(GAUSSIAN), jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(cast), GAUSSIAN.astype(ml_dtypes.bfloat16))
  assert weights.shape_of(GAUSSIAN) == (2, 64, 10)


def test_mxfp4_wants_groups_of_32():
  with pytest.raises(UserError, match='multiple of 32, not 48'):
    weights.quantize(jnp.zeros((48, 4)), 'mxfp4')
