"""FP8 against numpy: quantisation block by block, products of dequantised operands, gradients, and what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moe.ops import fp8, quantize_gpu

GAUSSIAN = np.random.default_rng(0).normal(size=(2, 300, 200)).astype(np.float32)
OUTLIERS = np.where(np.random.default_rng(1).random(GAUSSIAN.shape) < 0.01, 1e4 * GAUSSIAN, GAUSSIAN)


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('block', [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize(
  'x', [GAUSSIAN, OUTLIERS, 0 * GAUSSIAN, 1e-6 * GAUSSIAN], ids=['gaussian', 'outliers', '0', 'tiny']
)
def test_quantize_equals_loops_over_blocks(x, block, power_of_two):
  quantized = fp8.quantize(jnp.asarray(x), block, power_of_two)
  assert quantized.value.dtype == jnp.float8_e4m3fn
  assert np.isfinite(np.asarray(quantized.value, np.float32)).all()
  values = fp8.dequantize(quantized, block)
  for matrix in range(len(x)):
    expected, scales = oracle.quantize(x[matrix], *block, power_of_two)
    np.testing.assert_allclose(quantized.scale[matrix], scales, rtol=2e-7)
    np.testing.assert_allclose(values[matrix], expected, rtol=1e-6, atol=0)
  if power_of_two:
    assert (np.frexp(quantized.scale)[0] == 0.5).all()  # their log2, in float32, would hide the last bits
    again = fp8.quantize(values, block, power_of_two)
    np.testing.assert_array_equal(fp8.dequantize(again, block), values)


def test_small_values_beside_an_outlier_survive_in_other_blocks():
  x = np.full((1, 256), 1e-3, np.float32)
  x[0, 0] = 1e6
  values = np.asarray(fp8.dequantize(fp8.quantize(jnp.asarray(x), fp8.ROWS), fp8.ROWS))
  assert (values[0, 1:128] == 0).all()
  np.testing.assert_allclose(values[0, 128:], 1e-3, rtol=2**-4)


def naive_products(x, w, size_e, dy):
  """y, dx, dw in float64 of quantised operands, as the module's docstring says."""
  y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
  x_rows, dy_rows, start = oracle.quantize(x, 1, 128)[0], oracle.quantize(dy, 1, 128)[0], 0
  for e, size in enumerate(size_e):
    rows, w_e = slice(start, start + size), oracle.quantize(w[e], 128, 128)[0]
    y[rows], dx[rows], dw[e] = x_rows[rows] @ w_e, dy_rows[rows] @ w_e.T, x_rows[rows].T @ dy[rows]
    start += size
  return y, dx, dw


def gradients(backend):
  def run(x_MD, w_eDF, size_e, dy_MF):
    y_MF, pull = jax.vjp(lambda x, w: fp8.grouped_matmul(x, w, size_e, backend), x_MD, w_eDF)
    return y_MF, *pull(dy_MF)

  return run


@pytest.fixture(scope='module')
def compiled(fast_jit):
  return fast_jit(gradients('blocked'))


@pytest.mark.parametrize('size_e', [[100, 0, 60], [0, 0, 0], [0, 160, 0], [1, 2, 150]])
def test_products_and_gradients(size_e, compiled):
  """Compiled, so that XLA's leaving out a rounding to FP8 and back would be seen: it is 100 times the tolerance."""
  rng = np.random.default_rng(2)
  x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((160, 200), (3, 200, 140), (160, 140)))
  got = compiled(x, w, np.asarray(size_e, np.int32), dy)
  used = sum(size_e)
  for actual, expected, rows in zip(got, naive_products(x, w, size_e, dy), (used, used, len(w)), strict=True):
    scale = max(1e-30, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(actual)[:rows] / scale, expected[:rows] / scale, atol=1e-6)


def test_error_of_a_product_of_gaussians():
  rng = np.random.default_rng(3)
  x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((256, 512), (512, 384)))
  got, exact = np.asarray(fp8.matmul(jnp.asarray(x), jnp.asarray(w), 'blocked'), np.float64), x.astype(np.float64) @ w
  assert 0.03 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.04
  assert 1 - 2 * (got * exact).sum() / ((got**2).sum() + (exact**2).sum()) < 1e-3


@pytest.mark.parametrize('sizes', [(32768, 7168, 4096, 16), (1000, 264, 136, 5)])
def test_two_of_three_kernels_are_fp8_when_lowered_for_cuda(sizes):
  M, D, F, E = sizes
  make = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  operands = make(M, D), make(E, D, F), make(E, dtype=jnp.int32), make(M, F)
  text = jax.jit(gradients('mosaic_gpu')).trace(*operands).lower(lowering_platforms=('cuda',)).as_text()
  kernels = [line for line in text.splitlines() if 'custom_call @mosaic_gpu' in line]
  types = [line.rsplit(' : ', 1)[1] for line in kernels]
  assert sorted(types_of.count('f8E4M3FN') for types_of in types) == [0, 2, 2]
  assert 'dot_general' not in text


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('shape', [(64, 256), (1000, 1408), (8, 7168)])
def test_interpreted_kernel_quantizes_rows_as_jnp_does(shape, power_of_two):
  x = jnp.asarray(
    np.random.default_rng(4).normal(size=shape) * 10.0 ** np.arange(-6, 2).repeat(shape[1] // 8), 'bfloat16'
  )
  expected = fp8.quantize(x, fp8.ROWS, power_of_two)
  value, scale = quantize_gpu.rows(x, power_of_two, interpret=True)
  np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(expected.value, np.float32))
  np.testing.assert_array_equal(scale, expected.scale)


def test_interpreted_kernel_quantizes_matrices_as_jnp_does():
  w = jnp.asarray(np.random.default_rng(5).normal(size=(3, 256, 384)), 'bfloat16')
  expected = fp8.quantize(w, fp8.BLOCKS)
  value, turned, scale = quantize_gpu.matrices(w, interpret=True)
  np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(expected.value, np.float32))
  np.testing.assert_array_equal(np.asarray(turned, np.float32), np.asarray(value, np.float32).swapaxes(1, 2))
  np.testing.assert_array_equal(scale, expected.scale)
