"""FP8 against numpy: quantisation block by block, products of dequantised operands, gradients, and what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gpus import lower_for_gpu

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


def test_scales_are_the_smallest_powers_of_two_that_reach():
  fits = np.float32(448) * np.float32(2) ** np.arange(-20, 100, dtype=np.float32)
  for amax, scale in ((fits, fits / 448), (np.nextafter(fits, np.float32(0)), fits / 448)):
    np.testing.assert_array_equal(quantize_gpu.scale_of(jnp.asarray(amax), power_of_two=True), scale)
  above = quantize_gpu.scale_of(jnp.asarray(np.nextafter(fits, np.float32(np.inf))), power_of_two=True)
  np.testing.assert_array_equal(above, fits / 224)
  np.testing.assert_array_equal(quantize_gpu.inverse_of(above), 224 / fits)


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad, power_of_two):
  x = jnp.asarray(GAUSSIAN[0, :, :128]).at[3, 5].set(bad)
  finite = np.isfinite(fp8.dequantize(fp8.quantize(x, fp8.ROWS, power_of_two), fp8.ROWS))
  assert not finite[3, 5]
  assert finite[np.arange(len(x)) != 3].all()


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
def compiled():
  return jax.jit(gradients('blocked'))


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


def naive_wgrad(x, size_e, dy):
  """dw in float64 of operands quantised along tokens, in blocks of one expert's rows; x along channels before that."""
  dw, start = np.zeros((len(size_e), x.shape[1], dy.shape[1])), 0
  x_rows = oracle.quantize(x, 1, 128, power_of_two=True)[0]
  for e, size in enumerate(size_e):
    for first in range(start, start + size, 128):
      rows = slice(first, min(first + 128, start + size))
      x_b, dy_b = (oracle.quantize(a[rows], 128, 1, power_of_two=True)[0] for a in (x_rows, dy))
      dw[e] += x_b.T @ dy_b
    start += size
  return dw


@pytest.fixture(scope='module')
def wgrad_in_fp8():
  """`gradients`, compiled as where Wgrad in FP8 pays."""
  compiled = jax.jit(gradients('blocked'))

  def run(*operands):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(fp8, 'wgrad_pays', lambda *shape: True)
      return compiled(*operands)

  return run


@pytest.mark.parametrize('size_e', [[297, 0, 140], [0, 0, 0], [0, 437, 0], [128, 1, 256], [5, 60, 300]])
def test_weight_gradient_in_fp8(size_e, wgrad_in_fp8):
  """Past the last expert's row everything is NaN, and gets into nothing."""
  rng = np.random.default_rng(6)
  x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((437, 200), (3, 200, 140), (437, 140)))
  used = sum(size_e)
  x[used:], dy[used:] = np.nan, np.nan
  _, dx, dw = wgrad_in_fp8(x, w, np.asarray(size_e, np.int32), dy)
  expected, exact = naive_wgrad(x[:used], size_e, dy[:used]), np.zeros(dw.shape)
  start = 0
  for e, size in enumerate(size_e):
    rows, w_e = slice(start, start + size), oracle.quantize(w[e], 128, 128)[0]
    exact[e] = x[rows].T.astype(np.float64) @ dy[rows]
    of_rows = oracle.quantize(dy[rows], 1, 128, power_of_two=True)[0] @ w_e.T
    np.testing.assert_allclose(dx[rows], of_rows, atol=1e-6 * np.abs(of_rows).max(initial=0))
    start += size
  np.testing.assert_allclose(dw, expected, atol=1e-6 * np.abs(expected).max())
  if used:
    assert 0.03 < np.linalg.norm(dw - exact) / np.linalg.norm(exact) < 0.045


@pytest.mark.parametrize(
  ('shape', 'pays'),
  [
    ((32768, 16, 7168, 4096), True),
    ((32768, 16, 2048, 7168), True),
    ((32768, 16, 256, 512), False),  # turning takes more than the product saves
    ((8192, 64, 7168, 4096), False),  # writing dw takes more than multiplying, in bf16 too
  ],
)
def test_weight_gradient_is_in_fp8_where_it_pays(shape, pays):
  assert fp8.wgrad_pays(*shape) == pays


def test_error_of_a_product_of_gaussians():
  rng = np.random.default_rng(3)
  x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((256, 512), (512, 384)))
  got, exact = np.asarray(fp8.matmul(jnp.asarray(x), jnp.asarray(w), 'blocked'), np.float64), x.astype(np.float64) @ w
  assert 0.03 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.04
  assert 1 - 2 * (got * exact).sum() / ((got**2).sum() + (exact**2).sum()) < 1e-3


@pytest.mark.parametrize(
  ('sizes', 'fp8_products', 'quantisations'),
  [((32768, 7168, 4096, 16), 3, (1, 1, 1, 1)), ((1000, 264, 136, 5), 2, (2, 1, 0, 0))],
)
def test_kernels_when_lowered_for_cuda(sizes, fp8_products, quantisations):
  M, D, F, E = sizes
  make = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  operands = make(M, D), make(E, D, F), make(E, dtype=jnp.int32), make(M, F)
  text = lower_for_gpu(jax.jit(gradients('mosaic_gpu')), *operands).as_text()
  kernels = [line for line in text.splitlines() if 'custom_call @mosaic_gpu' in line]
  types = [line.rsplit(' : ', 1)[1] for line in kernels]
  assert sorted(types_of.count('f8E4M3FN') for types_of in types) == [0] * (3 - fp8_products) + [2] * fp8_products
  names = ('_rows_kernel', '_matrices_kernel', '_turned_kernel', '_both_ways_kernel')
  triton = [line for line in text.splitlines() if 'custom_call @__gpu$xla.gpu.triton' in line]
  assert tuple(sum(f'"{name}"' in line for line in triton) for name in names) == quantisations
  assert 'dot_general' not in text


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('shape', [(64, 256), (40, 1408), (8, 7168)])
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


SIZES = [([136, 0, 8, 144], 304), ([0, 0, 0], 24), ([0, 256], 256), ([8, 120, 376], 504)]


@pytest.mark.parametrize(('size_e', 'rows'), SIZES)
def test_blocks_hold_every_row_of_one_expert_each(size_e, rows):
  blocks = jax.device_get(quantize_gpu.blocks_of(jnp.asarray(size_e, jnp.int32), rows))
  expert_M, seen = np.repeat(np.arange(len(size_e)), size_e), []
  for e, (first, count) in enumerate(zip(blocks.first_e, blocks.count_e, strict=True)):
    for row, used in zip(blocks.row_B[first : first + count], blocks.rows_B[first : first + count], strict=True):
      assert 0 < used <= fp8.BLOCK
      assert (expert_M[row : row + used] == e).all()
      seen.extend(range(row, row + used))
  assert seen == list(range(sum(size_e)))
  assert not blocks.rows_B[blocks.count_e.sum() :].any()


@pytest.mark.parametrize(('size_e', 'rows'), SIZES)
def test_interpreted_kernels_turn_rows_as_jnp_does(size_e, rows):
  rng, used = np.random.default_rng(7), sum(size_e)
  x = jnp.asarray(rng.normal(size=(rows, 256)) * 10.0 ** rng.uniform(-6, 2, 256), 'bfloat16').at[used:].set(jnp.nan)
  blocks = quantize_gpu.blocks_of(jnp.asarray(size_e, jnp.int32), rows)
  in_rows, in_columns = fp8.quantize_both_ways(x, blocks, 'blocked')
  value, scale, *turned = quantize_gpu.both_ways(x, blocks, interpret=True)
  as_float32 = lambda a: np.asarray(a, np.float32)
  np.testing.assert_array_equal(as_float32(value[:used]), as_float32(in_rows.value[:used]))
  np.testing.assert_array_equal(scale[:used], in_rows.scale[:used])
  of_rows = quantize_gpu.turned(*in_rows, blocks, interpret=True)
  for got, expected in ((turned, in_columns), (of_rows, fp8.turn(in_rows, blocks, 'blocked'))):
    np.testing.assert_array_equal(as_float32(got[0]), as_float32(expected.value))
    np.testing.assert_array_equal(got[1], expected.scale)
    assert got[0].shape == (256, fp8.BLOCK * len(blocks.row_B))
