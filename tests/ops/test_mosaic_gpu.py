"""The Hopper kernels without a Hopper: their tile table, their arithmetic interpreted, and what is compiled for CUDA.

`experiments/bench.py --suite=gemm` checks all three products on a GPU before it times them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as interpret
from jax.sharding import PartitionSpec as P

from moe.mesh import abstract_mesh
from moe.ops.grouped_matmul import grouped_matmul, mosaic_gpu_fp8, persistent
from moe.ops.grouped_matmul.persistent import ROW_MULTIPLE, TILE_M, tile_table

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
  count = tiles.count[0]
  assert count == sum(-(-size // tile_m) for size in size_e) <= len(tiles.row)
  for expert, row, rows in zip(tiles.expert[:count], tiles.row[:count], tiles.rows[:count], strict=True):
    assert row % ROW_MULTIPLE == 0
    assert rows == tile_m or rows == size_e[expert] < tile_m
    assert (expert_M[row : row + rows] == expert).all()
    assert len(expert_M[row : row + rows]) == rows
    stored[row : row + rows] = True
  assert stored.all()


@pytest.mark.parametrize(
  ('size_e', 'row_multiple', 'widths'),
  [([136, 0, 40], 8, (128, 128)), ([0, 0, 256], 8, (64, 320)), ([3, 0, 130], 1, (72, 40))],
)
def test_interpreted_rows_by_matrix(size_e, row_multiple, widths):
  """Pallas interprets the kernel without transposes, so not yet those of the gradients."""
  D, F = widths
  rng = np.random.default_rng(0)
  x_MD, w_eDF = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((256, D), (3, D, F)))
  how = interpret.InterpretGPUParams(out_of_bounds_reads='uninitialized', uninitialized_memory='zero')
  with interpret.force_gpu_interpret_mode(how), pytest.MonkeyPatch.context() as patch:
    patch.setattr(persistent, 'DEFAULT_SMS', 2)
    y_MF = grouped_matmul(x_MD, w_eDF, jnp.asarray(size_e, jnp.int32), 'mosaic_gpu', row_multiple)
  expert_M = np.repeat(np.arange(3), size_e)
  x, w = np.asarray(x_MD, np.float32)[: len(expert_M)], np.asarray(w_eDF, np.float32)[expert_M]
  np.testing.assert_allclose(
    np.asarray(y_MF, np.float32)[: len(x)], np.einsum('md,mdf->mf', x, w), rtol=2**-8, atol=1e-2
  )


def gradients(x_MD, w_eDF, size_e, dy_MF):
  y_MF, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, size_e, 'mosaic_gpu', ROW_MULTIPLE), x_MD, w_eDF)
  return y_MF, *pull(dy_MF)


def shapes(rows, D, F, experts, dtype=jnp.bfloat16):
  make = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  return make(rows, D), make(experts, D, F), make(experts, dtype=jnp.int32), make(rows, F)


@pytest.mark.parametrize('sizes', [(32768, 7168, 4096, 16), (4096, 512, 256, 256), (1000, 264, 136, 5)])
def test_three_kernels_are_lowered_for_cuda(sizes):
  """One per product, whatever the number of experts, and no dense product beside them."""
  text = jax.jit(gradients).trace(*shapes(*sizes)).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @mosaic_gpu') == 3
  assert 'dot_general' not in text
  assert 'ragged_dot' not in text


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def test_types_and_reductions_inside_shard_map():
  """Outputs vary where the operands do, and the gradient sums weights over data, never tokens over anything."""
  rows, D, F, experts = 512, 128, 64, 4
  varying = []

  def local(x, w, size_e, dy):
    results = gradients(x, w, size_e[0], dy)
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
