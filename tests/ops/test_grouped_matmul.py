"""Grouped matmul backends against a loop over experts: values, both gradients, and rows that belong to nobody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe.errors import UserError
from moe.model import resolve
from moe.ops.grouped_matmul import grouped_matmul

BACKENDS = ('blocked', 'ragged_dot')  # tests/ops/test_mosaic_gpu.py has the other

D, F, E = 5, 3, 4
# Rows below, between and above the tiles of `blocked`, none a multiple of them.
ROWS = (3, 40, 150, 700)


@pytest.fixture(scope='module')
def compiled():
  """(x, w, size, dy) -> y, dx, dw of a backend; compiled once per shape and dtype."""

  @functools.cache
  def compiled(backend):
    def run(x_MD, w_eDF, size_e, dy_MF):
      y_MF, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, size_e, backend), x_MD, w_eDF)
      return y_MF, *pull(dy_MF)

    return jax.jit(run)

  return compiled


def loop(x_MD, w_eDF, size_e, dy_MF):
  """y, dx and dw in float64; rows past the sum stay 0."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x_MD, w_eDF, dy_MF))
  y, dx, dw, start = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w), 0
  for e, size in enumerate(size_e):
    rows = slice(start, start + size)
    y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    start += size
  return y, dx, dw


def sizes(rows, rng):
  """Sizes per expert that are easy to get wrong in `rows` rows, then random ones."""
  yield [0] * E
  yield [rows, 0, 0, 0]
  yield [0, 0, 0, rows]
  yield [0, rows - 1, 0, 1]
  yield [1, 0, 1, 0]
  yield [rows // 4] * E
  for tile in (64, 128, 256):  # whole tiles, and one row more or less
    if tile + 2 < rows:
      yield [tile, tile - 1 if 2 * tile < rows else 0, 0, 1]
      yield [1, tile, 0, 0]
      yield [0, tile + 1, 0, rows - tile - 1]
  for _ in range(6):
    cuts = np.sort(rng.integers(0, rows + 1, E))
    yield list(np.diff(cuts, prepend=0))


def inputs(rows, rng, dtype=np.float32):
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return draw(rows, D), draw(E, D, F), draw(rows, F)


def check(actual, expected, used, tolerance):
  """Compares rows that belong to experts; the others must be finite, and add nothing to dw."""
  (y, dx, dw), (expected_y, expected_dx, expected_dw) = (
    map(lambda a: np.asarray(a, np.float64), x) for x in (actual, expected)
  )
  scale = max(1, np.abs(expected_dw).max())
  np.testing.assert_allclose(y[:used], expected_y[:used], rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(dx[:used], expected_dx[:used], rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(dw, expected_dw, rtol=tolerance, atol=tolerance * scale)
  assert np.isfinite(y).all()
  assert np.isfinite(dx).all()


@pytest.mark.parametrize('rows', ROWS)
@pytest.mark.parametrize('backend', BACKENDS)
def test_equals_loop(backend, rows, compiled):
  rng = np.random.default_rng(rows)
  x, w, dy = inputs(rows, rng)
  for size_e in sizes(rows, rng):
    used = sum(size_e)
    past_M1 = np.arange(rows)[:, None] >= used
    x_large, dy_large = (np.where(past_M1, np.float32(1e6), a) for a in (x, dy))  # what lies there must not matter
    actual = compiled(backend)(x_large, w, np.asarray(size_e, np.int32), dy_large)
    check(actual, loop(x, w, size_e, dy), used, 1e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_bfloat16(backend, compiled):
  rng = np.random.default_rng(1)
  x, w, dy = inputs(150, rng, jnp.bfloat16)
  size_e = [70, 0, 3, 60]
  y, dx, dw = actual = compiled(backend)(x, w, jnp.asarray(size_e, jnp.int32), dy)
  assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
  check(actual, loop(x, w, size_e, dy), sum(size_e), 2**-7)


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('backend', BACKENDS)
def test_mixed_operands_inside_shard_map(backend, inside, mesh_of):
  """Rows differ over data and expert, matrices are replicated over data: their gradient is the sum over data.

  The gradient is taken inside the shard_map or through it.
  """
  mesh, held, rows = mesh_of(data=2, expert=2, tensor=2), 2, 40
  rng = np.random.default_rng(2)
  x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4 * rows, D), (4, D, 6), (4 * rows, 6)))
  size = np.array([[30, 5], [0, 40], [7, 0], [0, 0]], np.int32)  # per (data, expert) shard
  batch = P(('data', 'expert'))
  specs = (batch, P('expert', None, 'tensor'), batch, P(('data', 'expert'), 'tensor'))

  def local(x, w, size_e):
    return grouped_matmul(x, w, size_e[0], backend)

  def gradients_inside(x, w, size_e, dy):
    y, pull = jax.vjp(lambda x, w: local(x, w, size_e), x, w)
    return y, *pull(dy)

  def gradients_through(x, w, size_e, dy):
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs[:3], out_specs=specs[3])
    y, pull = jax.vjp(lambda x, w: mapped(x, w, size_e), x, w)
    return y, *pull(dy)

  if inside:
    run = jax.shard_map(gradients_inside, mesh=mesh, in_specs=specs, out_specs=(specs[3], specs[0], specs[1]))
  else:
    run = gradients_through
  y, dx, dw = jax.jit(run)(x, w, jnp.asarray(size), dy)

  expected_dw = np.zeros(w.shape)
  for shard in range(4):
    own, part = slice(shard % 2 * held, shard % 2 * held + held), slice(shard * rows, (shard + 1) * rows)
    expected_y, expected_dx, part_dw = loop(x[part], w[own], size[shard], dy[part])
    used = size[shard].sum()
    np.testing.assert_allclose(y[part][:used], expected_y[:used], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx[part][:used], expected_dx[:used], rtol=1e-5, atol=1e-5)
    expected_dw[own] += part_dw
  np.testing.assert_allclose(dw, expected_dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('platform', 'compute', 'backend'),
  [
    ('cpu', 'bfloat16', 'blocked'),
    ('tpu', 'bfloat16', 'ragged_dot'),
    ('gpu', 'bfloat16', 'ragged_dot'),
    ('hopper', 'bfloat16', 'mosaic_gpu'),
    ('hopper', 'float32', 'ragged_dot'),
  ],
)
def test_auto_backend(platform, compute, backend):
  assert resolve.grouped_matmul('auto', platform, compute) == backend
  assert resolve.grouped_matmul('blocked', platform, compute) == 'blocked'


@pytest.mark.parametrize(('platform', 'compute'), [('cpu', 'bfloat16'), ('gpu', 'bfloat16'), ('hopper', 'float32')])
def test_mosaic_gpu_is_refused_where_it_cannot_run(platform, compute):
  with pytest.raises(UserError, match='needs a platform of kind hopper'):
    resolve.grouped_matmul('mosaic_gpu', platform, compute)
