"""The Hopper kernels without a Hopper: their tile table, their arithmetic interpreted, and what is compiled for CUDA.

`experiments/bench.py --suite=gemm` checks all three products on a GPU before it times them.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu
from jax._src.pallas.mosaic_gpu.interpret import params as interpret
from jax.sharding import PartitionSpec as P

from moe.ops import fp8
from moe.ops.grouped_matmul import _mosaic_gpu_fp8 as mosaic_gpu_fp8
from moe.ops.grouped_matmul import _persistent as persistent
from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.grouped_matmul._persistent import ROW_MULTIPLE, TILE_M, tile_table
from moe.ops.quantize_gpu import blocks_of
from moe.parallel.cut import equations
from moe.parallel.mesh import abstract_mesh

SIZES = (
  [0, 0, 0, 0],
  [512, 0, 0, 0],
  [0, 8, 0, 504],
  [128, 128, 128, 128],
  [136, 120, 0, 16],
  [248, 8, 256, 0],
)


@pytest.mark.parametrize('tile_m', [TILE_M, mosaic_gpu_fp8.TILE_M])
@pytest.mark.parametrize('size_e', SIZES)
def test_tiles_cover_every_row_of_one_expert_each(size_e, tile_m):
  tiles = jax.device_get(tile_table(jnp.asarray(size_e, jnp.int32), 512, tile_m))
  expert_M = np.repeat(np.arange(len(size_e)), size_e)
  stored = np.zeros(len(expert_M), bool)
  count = tiles.used[0]
  assert count == sum(-(-size // tile_m) for size in size_e) <= len(tiles.row)
  for expert, row, rows in zip(tiles.expert[:count], tiles.row[:count], tiles.rows[:count], strict=True):
    assert row % ROW_MULTIPLE == 0
    assert rows == tile_m or rows == size_e[expert] < tile_m
    assert (expert_M[row : row + rows] == expert).all()
    assert len(expert_M[row : row + rows]) == rows
    stored[row : row + rows] = True
  assert stored.all()


@contextlib.contextmanager
def interpreted():
  """Kernels are run by Pallas' interpreter, on two SMs."""
  how = interpret.InterpretGPUParams(out_of_bounds_reads='uninitialized', uninitialized_memory='zero')
  with interpret.force_gpu_interpret_mode(how), pytest.MonkeyPatch.context() as patch:
    patch.setattr(persistent, 'DEFAULT_SMS', 2)
    yield


@pytest.mark.parametrize(
  ('size_e', 'row_multiple', 'widths'),
  [([136, 0, 40], 8, (128, 128)), ([0, 0, 256], 8, (64, 320)), ([3, 0, 130], 1, (72, 40))],
)
def test_interpreted_rows_by_matrix(size_e, row_multiple, widths):
  """Pallas interprets the kernel without transposes, so not yet those of the gradients."""
  D, F = widths
  rng = np.random.default_rng(0)
  x_MD, w_eDF = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((256, D), (3, D, F)))
  with interpreted():
    y_MF = grouped_matmul(x_MD, w_eDF, jnp.asarray(size_e, jnp.int32), 'mosaic_gpu', row_multiple)
  expert_M = np.repeat(np.arange(3), size_e)
  x, w = np.asarray(x_MD, np.float32)[: len(expert_M)], np.asarray(w_eDF, np.float32)[expert_M]
  np.testing.assert_allclose(
    np.asarray(y_MF, np.float32)[: len(x)], np.einsum('md,mdf->mf', x, w), rtol=2**-8, atol=1e-2
  )


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11, 2), reason='needs jax 0.11.2: before, Pallas interprets no transposed references'
)
@pytest.mark.parametrize('widths', [(128, 256), (256, 128)])
@pytest.mark.parametrize('size_e', [[136, 0, 264], [0, 0, 8]])
def test_interpreted_fp8_products(size_e, widths):
  """All three against float64 products of the dequantised operands; no width is a multiple of a tile's rows."""
  (D, F), E, used = widths, len(size_e), sum(size_e)
  rng = np.random.default_rng(1)
  x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((512, D), (E, D, F), (512, F)))
  x[used:], dy[used:] = np.nan, np.nan
  size = jnp.asarray(size_e, jnp.int32)
  blocks = blocks_of(size, 512)
  x, dy = (fp8.quantize(jnp.asarray(a), fp8.ROWS) for a in (x, dy))
  of_experts = fp8.quantize_matrices(jnp.asarray(w), 'blocked')
  turned = [fp8.turn(a, blocks, 'blocked') for a in (x, dy)]
  with interpreted():
    y_MF, dx_MD = (
      fp8.product(a, b, size, 'mosaic_gpu', jnp.float32) for a, b in zip((x, dy), of_experts[::-1], strict=True)
    )
    dw_eDF = fp8.product_of_turned(*turned, blocks, 'mosaic_gpu', jnp.float32)
  x, dy = (np.asarray(fp8.dequantize(a, fp8.ROWS), np.float64)[:used] for a in (x, dy))
  w = np.asarray(fp8.dequantize(of_experts[0], fp8.BLOCKS), np.float64)[np.repeat(np.arange(E), size_e)]
  np.testing.assert_allclose(y_MF[:used], np.einsum('md,mdf->mf', x, w), rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dx_MD[:used], np.einsum('mf,mdf->md', dy, w), rtol=1e-5, atol=1e-4)
  by_tokens = [fp8.dequantize(fp8.Quantized(a.value.T, a.scale), fp8.COLUMNS) for a in turned]
  x, dy = (np.asarray(a, np.float64).reshape(-1, fp8.BLOCK, a.shape[1]) for a in by_tokens)
  for e in range(E):
    mine = slice(blocks.first_e[e], blocks.first_e[e] + blocks.count_e[e])
    np.testing.assert_allclose(dw_eDF[e], np.einsum('btd,btf->df', x[mine], dy[mine]), rtol=1e-5, atol=1e-4)


def gradients(x_MD, w_eDF, size_e, dy_MF):
  y_MF, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, size_e, 'mosaic_gpu', ROW_MULTIPLE), x_MD, w_eDF)
  return y_MF, *pull(dy_MF)


def shapes(rows, D, F, experts, dtype=jnp.bfloat16):
  make = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  return make(rows, D), make(experts, D, F), make(experts, dtype=jnp.int32), make(rows, F)


@pytest.mark.parametrize('sizes', [(32768, 7168, 4096, 16), (4096, 512, 256, 256), (1000, 264, 136, 5)])
def test_three_kernels_are_lowered_for_cuda(sizes):
  """One per product, whatever the number of experts, and no dense product beside them."""
  text = lower_for_gpu(jax.jit(gradients), *shapes(*sizes)).as_text()
  assert text.count('custom_call @mosaic_gpu') == 3
  assert 'dot_general' not in text
  assert 'ragged_dot' not in text


def fp8_gradients(x_MD, w_eDF, size_e, dy_MF):
  y_MF, pull = jax.vjp(lambda x, w: fp8.grouped_matmul(x, w, size_e, 'mosaic_gpu'), x_MD, w_eDF)
  return y_MF, *pull(dy_MF)


@pytest.mark.parametrize(
  ('products', 'wgrad_in_fp8'), [(gradients, False), (fp8_gradients, False), (fp8_gradients, True)]
)
def test_types_and_reductions_inside_shard_map(products, wgrad_in_fp8, monkeypatch):
  """Outputs vary where the operands do, and the gradient sums weights over data, never tokens over anything."""
  monkeypatch.setattr(fp8, 'wgrad_pays', lambda *shape: wgrad_in_fp8)
  rows, D, F, experts = 512, 256, 128, 4
  varying = []

  def local(x, w, size_e, dy):
    results = products(x, w, size_e[0], dy)
    varying.extend(jax.typeof(result).manual_axis_type.varying for result in results)
    return results

  batch, columns = P(('data', 'expert')), P(('data', 'expert'), 'tensor')
  specs = (batch, P('expert', None, 'tensor'), batch, columns)
  mapped = jax.shard_map(local, mesh=abstract_mesh((1, 2, 2, 2)), in_specs=specs, out_specs=(columns, batch, specs[1]))
  make = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  operands = (make(4 * rows, D), make(experts, D, 2 * F), make(4, experts // 2, dtype=jnp.int32), make(4 * rows, 2 * F))
  jaxpr = jax.make_jaxpr(mapped)(*operands)
  assert varying == [{'data', 'expert', 'tensor'}, {'data', 'expert'}, {'expert', 'tensor'}]
  sums = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name.startswith('psum')]
  reduced = sorted((tuple(sum.params['axes']), sum.invars[0].aval.shape) for sum in sums)
  # dx is a sum over tensor, because x is the same there; dw one over data.
  assert reduced == [(('data',), (experts // 2, D, F)), (('tensor',), (rows, D))]
