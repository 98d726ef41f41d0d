"""Products of few rows against numpy, expert by expert: in jnp, and the GPU kernel interpreted and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu
from jax.sharding import PartitionSpec as P
from test_lowering import operations

from moe.ops import weights
from moe.ops.decode import few_rows, few_rows_gpu
from moe.ops.decode.few_rows_gpu import item_of, item_rows
from moe.parallel.mesh import abstract_mesh

KINDS = ('array', 'fp8', 'mxfp4')
quantize = jax.jit(weights.quantize, static_argnums=1)  # compiled whole, since each operation by itself takes as long
dequantize = jax.jit(weights.dequantize, static_argnums=1)
# rows per expert, and rows that no expert has
LOADS = {
  'uneven': ([3, 0, 20, 1, 9], 2),
  'all_in_one': ([0, 0, 37, 0], 0),
  'none': ([0, 0], 3),
  'one_row': ([0, 0, 1, 0], 0),
  'few_of_many': ([0, 1] * 10, 0),
  'two_of_many': ([0] * 9 + [2] + [0] * 9, 2),
}


def inputs(load, K, N, kind, dtype):
  """Rows, two weights, sizes, and the float64 matrices that the weights stand for."""
  sizes, rest = LOADS[load]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(sum(sizes) + rest, K)) * np.exp2(rng.integers(-9, 9, (sum(sizes) + rest, 1))), dtype)
  drawn = jnp.asarray(rng.normal(size=(2, len(sizes), K, N)) / 16, dtype)
  ws = [drawn[i] if kind == 'array' else quantize(drawn[i], kind) for i in range(2)]
  matrices = [np.asarray(dequantize(w, jnp.float32), np.float64) for w in ws]
  return x, ws, jnp.array(sizes, jnp.int32), matrices


def exact(x, matrices, sizes):
  """The products with one matrix, or the SwiGLU of two, in float64."""
  x, row = np.asarray(x, np.float64), 0
  y = np.zeros((len(x), matrices[0].shape[-1]))
  for e, size in enumerate(np.asarray(sizes)):
    products = [x[row : row + size] @ w[e] for w in matrices]
    y[row : row + size] = products[0]
    if len(products) == 2:
      y[row : row + size] *= np.exp(-np.logaddexp(0, -products[0])) * products[1]
    row += size
  return y


def feed_forward(x, matrices):
  """Rows through gate, up and down projection [1, D, F], [1, D, F] and [1, F, D], rounded to their dtype in between."""
  hidden = exact(x, matrices[:2], [len(x)]).astype(x.dtype).astype(np.float64)
  return hidden @ matrices[2][0]


def assert_near(y, expected, dtype):
  """Within rounding of the result, which is 2^-8 in bfloat16, by the largest value of the row."""
  assert y.dtype == dtype
  largest = np.abs(expected).max(1, keepdims=True)
  unit = np.where(largest > 0, largest, 1)
  tolerance = 2e-6 if dtype == jnp.float32 else 2.0**-8
  np.testing.assert_allclose(np.asarray(y, np.float64) / unit, expected / unit, rtol=0, atol=tolerance)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  ('load', 'dtype'), [*((load, jnp.float32) for load in LOADS), ('uneven', jnp.bfloat16), ('few_of_many', jnp.bfloat16)]
)
def test_products_equal_numpy_expert_by_expert(load, kind, dtype):
  x, ws, sizes, matrices = inputs(load, 160, 72, kind, dtype)
  assert_near(jax.jit(few_rows.matmul)(x, ws[0], sizes), exact(x, matrices[:1], sizes), dtype)
  assert_near(jax.jit(few_rows.swiglu)(x, *ws, sizes), exact(x, matrices, sizes), dtype)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rows', [1, 5])
def test_dense_products_equal_numpy(rows, kind):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32)
  drawn = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(64, 32), (64, 32), (32, 40)]]
  ws = [w if kind == 'array' else quantize(w, kind) for w in drawn]
  matrices = [np.asarray(dequantize(w, jnp.float32), np.float64)[None] for w in ws]
  assert_near(few_rows.parts_dense(x, ws[0]).sum(0), exact(x, matrices[:1], [rows]), jnp.float32)
  y = few_rows.feed_forward_dense(x, *ws)
  assert_near(y.sum(0), feed_forward(x, matrices), jnp.float32)


@pytest.mark.parametrize('expert', [None, 1])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('rows', 'programs'), [(1, 1), (1, 64), (5, 64)])
@pytest.mark.usefixtures('short_kernels')
def test_parts_of_dense_products_add_up_to_numpy(rows, programs, kind, expert, monkeypatch):
  """Of one matrix, or one of several; everywhere as many parts. If one, it is in bfloat16, as the rows are."""
  monkeypatch.setattr(few_rows_gpu, 'PROGRAMS', programs)
  x, ws, _, matrices = inputs('uneven', 512, 72, kind, jnp.bfloat16)
  x, w, matrix = x[:rows], ws[0], matrices[0][(expert or 0), None]
  if expert is None:
    w = jax.tree.map(lambda a: a[0], w)
  by_kernel = few_rows_gpu.parts_dense(x, *few_rows._stack(w, expert), interpret=True)
  for parts in (by_kernel, few_rows.parts_dense(x, w, expert)):
    assert parts.shape == by_kernel.shape
    assert parts.dtype == (jnp.float32 if programs > 1 else jnp.bfloat16)
    assert (len(parts) > 1) == (programs > 1)
    assert_near(parts.sum(0).astype(jnp.bfloat16), exact(x, [matrix], [rows]), jnp.bfloat16)


@pytest.mark.parametrize('rows', [1, 5])
def test_float32_weights_make_float32(rows):
  """Of bfloat16 rows, too, as the router's."""
  x, ws, _, matrices = inputs('uneven', 256, 72, 'array', jnp.float32)
  x, w = x[:rows].astype(jnp.bfloat16), ws[0][0]
  by_kernel = few_rows_gpu.parts_dense(x, w[None], 0, interpret=True).sum(0)
  for y in (by_kernel, few_rows.parts_dense(x, w).sum(0)):
    assert_near(y, exact(x, [matrices[0][:1]], [rows]), jnp.float32)


@pytest.fixture
def short_kernels(monkeypatch):
  """Kernels that compile sooner, as their loops are unrolled less."""
  for tiles in (few_rows_gpu.ONE_ROW, few_rows_gpu.MORE_ROWS):
    for kind, tile in tiles.items():
      monkeypatch.setitem(tiles, kind, tile._replace(unroll=min(tile.unroll, 2)))


# Widths that are whole tiles and such that are not; sums in one part and in several.
@pytest.mark.parametrize(('K', 'N', 'programs'), [(256, 128, 1), (160, 72, 128)])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('load', ['uneven', 'few_of_many'])
@pytest.mark.usefixtures('short_kernels')
def test_the_kernel_interpreted_equals_numpy(load, kind, K, N, programs, monkeypatch):
  """It multiplies float16 or bfloat16 exactly, so only the result is rounded."""
  monkeypatch.setattr(few_rows_gpu, 'PROGRAMS', programs)
  x, ws, sizes, matrices = inputs(load, K, N, kind, jnp.bfloat16)
  y = few_rows_gpu.products(x, tuple(ws), sizes, interpret=True)
  assert_near(y, exact(x, matrices, sizes), jnp.bfloat16)


def gate_up_down(kind, dtype, experts, D=512, F=96):
  """Three weights, and the float64 matrices that they stand for."""
  rng = np.random.default_rng(2)
  drawn = [jnp.asarray(rng.normal(size=(experts, *shape)) / 16, dtype) for shape in [(D, F), (D, F), (F, D)]]
  ws = [w if kind == 'array' else quantize(w, kind) for w in drawn]
  return ws, [np.asarray(dequantize(w, jnp.float32), np.float64) for w in ws]


@pytest.mark.parametrize(
  ('dtype', 'tensor_cores', 'programs'),
  [(jnp.float32, False, 64), (jnp.bfloat16, False, 1), (jnp.bfloat16, False, 64), (jnp.bfloat16, True, 64)],
)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.usefixtures('short_kernels')
def test_rows_with_an_expert_each(kind, dtype, tensor_cores, programs, monkeypatch):
  """Two rows of x for three experts each, in any order, one expert for both, and one row without."""
  monkeypatch.setattr(few_rows_gpu, 'PROGRAMS', programs)
  if tensor_cores:
    monkeypatch.setattr(few_rows_gpu, 'ONE_ROW', {})
  x = inputs('few_of_many', 512, 72, kind, dtype)[0][:2]
  (ws, matrices), expert_M = gate_up_down(kind, dtype, experts=5), jnp.array([2, 0, 4, 2, 5, 3])
  assert (few_rows_gpu.count_parts(ws[:2], 'each', 6) > 1) == (programs > 1)
  by_kernel = few_rows_gpu.feed_forward_each(x, *ws, expert_M, interpret=True)
  for parts in (by_kernel, few_rows.feed_forward_each(x, *ws, expert_M)):
    assert parts.shape == by_kernel.shape
    y = parts.sum(0).astype(dtype)
    np.testing.assert_array_equal(y[4], 0)
    for m, expert in enumerate(expert_M.tolist()):
      if expert < 5:
        own = [w[expert : expert + 1] for w in matrices]
        assert_near(y[m : m + 1], feed_forward(x[m // 3 : m // 3 + 1], own), dtype)


@pytest.mark.parametrize('expert', [None, 1])
@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.usefixtures('short_kernels')
def test_a_feed_forward_of_all_rows(kind, rows, expert):
  """The second product of one row reads the first's parts; of more rows, it reads their sum."""
  x = inputs('few_of_many', 512, 72, kind, jnp.bfloat16)[0][:rows]
  ws, matrices = gate_up_down(kind, jnp.bfloat16, experts=2)
  own = [w[(expert or 0), None] for w in matrices]
  if expert is None:
    ws = few_rows.matrix(ws, 0)
  stacked, only = few_rows._stack(ws, expert)
  by_kernel = few_rows_gpu.feed_forward_dense(x, *stacked, only, interpret=True)
  plain = few_rows.feed_forward_dense(x, *ws, expert)
  for parts in (by_kernel, plain):
    assert parts.shape == by_kernel.shape
    assert_near(parts.sum(0).astype(jnp.bfloat16), feed_forward(x, own), jnp.bfloat16)


@pytest.mark.parametrize(('load', 'kind'), [('uneven', 'mxfp4'), ('few_of_many', 'fp8'), ('none', 'array')])
@pytest.mark.usefixtures('short_kernels')
def test_the_kernel_interpreted_in_float32(load, kind):
  x, ws, sizes, matrices = inputs(load, 256, 64, kind, jnp.float32)
  y = few_rows_gpu.products(x, (ws[0],), sizes, interpret=True)
  assert_near(y, exact(x, matrices[:1], sizes), jnp.float32)


def test_weights_of_two_kinds_are_refused():
  x, ws, sizes, _ = inputs('uneven', 64, 32, 'fp8', jnp.bfloat16)
  with pytest.raises(ValueError, match='must be of one kind, not Fp8Weight, '):
    few_rows_gpu.products(x, (ws[0], dequantize(ws[1], jnp.bfloat16)), sizes, interpret=True)


def test_rows_of_any_size_survive_in_float16():
  """bfloat16 reaches 2^127; a row's small values keep their bits down to 2^-29 of its largest."""
  x = jnp.asarray([[2.0**120, -1.5 * 2.0**92], [2.0**-100, 2.0**-126], [0, 0]], jnp.bfloat16)
  scaled, factor = few_rows_gpu._as_float16(x)
  assert scaled.dtype == jnp.float16
  np.testing.assert_array_equal(np.asarray(scaled, np.float64) * np.asarray(factor, np.float64)[:, None], x)


@pytest.mark.parametrize('load', LOADS)
def test_work_items_cover_every_row_once(load):
  sizes, rest = LOADS[load]
  rows, owner = sum(sizes) + rest, [*np.repeat(np.arange(len(sizes)), sizes)]
  tile = item_rows(rows, len(sizes))
  groups = min(len(sizes) + 1, rows)
  seen = []
  for i in range(groups + (rows - groups) // tile):
    item = item_of(i, jnp.array([*sizes, 0, 0], jnp.int32), rows, tile)
    assert item.rows <= tile
    mine = list(range(int(item.row), int(item.row) + int(item.rows)))
    assert all(row >= len(owner) if item.past else owner[row] == item.expert for row in mine)
    seen += mine
  assert seen == list(range(rows))


@pytest.mark.parametrize('rows', [6, 192])
@pytest.mark.parametrize('kind', KINDS)
def test_on_cuda_the_kernel_reads_the_weights_as_they_are(kind, rows):
  """Inside shard_map, lowered for GPUs that are not here: nothing but the kernel takes anything of a weight's size."""
  experts, K, N = 16, 512, 256
  w = jax.ShapeDtypeStruct((experts, K, N), jnp.bfloat16)
  if kind != 'array':
    w = jax.eval_shape(functools.partial(weights.quantize, kind=kind), w)
  x, sizes = jax.ShapeDtypeStruct((2 * rows, K), jnp.bfloat16), jax.ShapeDtypeStruct((experts,), jnp.int32)
  mesh = abstract_mesh((1, 2, 1, 2))

  def shard(x_MD, w, size_e):
    y = few_rows.swiglu(x_MD, w, w, size_e)
    assert jax.typeof(y).manual_axis_type.varying == {'data', 'tensor'}
    one = few_rows.parts_dense(x_MD, jax.tree.map(lambda a: a[0], w)).sum(0)
    assert jax.typeof(one).manual_axis_type.varying == {'data', 'tensor'}
    return y, one

  over = P(None, None, 'tensor')
  shard = jax.shard_map(
    shard, mesh=mesh, in_specs=(P('data'), over, P()), out_specs=(P('data', 'tensor'),) * 2, check_vma=True
  )
  module = lower_for_gpu(jax.jit(shard), x, w, sizes, shape=(1, 2, 1, 2)).compiler_ir()
  kernels, takers = 0, set()
  for op in operations(module):
    target = str(op.attributes['call_target_name']) if op.name == 'stablehlo.custom_call' else op.name
    kernels += 'triton' in target
    taken = [int(np.prod(value.type.shape)) for value in op.operands if hasattr(value.type, 'shape')]
    if any(size >= experts * K * N // 4 for size in taken):  # of a shard, with two values in a byte
      takers.add(target)
  assert kernels == 2
  assert takers == {'"__gpu$xla.gpu.triton"', 'sdy.manual_computation', 'stablehlo.slice'}  # the slice: w[0]
