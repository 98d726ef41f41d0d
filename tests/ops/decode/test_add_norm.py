"""The residual stream's sum and norm against float64: in jnp, and the GPU kernel interpreted and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu

from moe.ops.decode import add_norm
from moe.ops.decode.add_norm import Stream, Sum

EPS = 1e-6
# Rows T, width D, and of each sum: parts P, rows to be weighted K (0: no weights).
CASES = {
  'nothing': (3, 48, ()),
  'parts': (2, 64, ((5, 0),)),
  'experts': (3, 40, ((2, 4),)),
  'both': (2, 32, ((3, 2), (4, 0))),
  'one_part': (1, 32, ((1, 0),)),
}


def inputs(case, dtype):
  T, D, sizes = CASES[case]
  rng = np.random.default_rng(0)
  normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)
  sums = []
  for P, K in sizes:
    parts_PMD = normal(P, T * max(K, 1), D, dtype=dtype if P == 1 else jnp.float32)
    sums.append(Sum(parts_PMD, normal(T, K, dtype=jnp.float32) if K else None))
  return Stream(normal(T, D), tuple(sums)), jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32)


def exact(stream, scale_D):
  """Row by row, in float64."""
  out = np.array(stream.x_TD, np.float64)
  for parts_PMD, weight_TK in stream.sums:
    y_MD = np.asarray(parts_PMD, np.float64).sum(0)
    weight_TK = np.ones((len(out), 1)) if weight_TK is None else np.asarray(weight_TK, np.float64)
    for t, weight_K in enumerate(weight_TK):
      out[t] += weight_K @ y_MD[t * len(weight_K) : (t + 1) * len(weight_K)]
  return out, out / np.sqrt((out**2).mean(1, keepdims=True) + EPS) * np.asarray(scale_D, np.float64)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('case', CASES)
def test_sum_and_norm(case, dtype):
  stream, scale_D = inputs(case, dtype)
  expected = exact(stream, scale_D)
  kernel = jax.jit(functools.partial(add_norm._on_gpu, eps=EPS, interpret=True))
  for found in (add_norm.add_norm(stream, scale_D, EPS), kernel(stream, scale_D)):
    for got, want in zip(found, expected, strict=True):
      assert got.dtype == dtype
      tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-7  # two roundings of 2^-9 or 2^-8
      np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)
  added = np.asarray(stream.total(), np.float64)
  np.testing.assert_allclose(added, expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('case', CASES)
def test_is_one_kernel_on_gpus(case):
  stream, scale_D = inputs(case, jnp.bfloat16)
  run = jax.jit(functools.partial(add_norm.add_norm, eps=EPS))
  assert lower_for_gpu(run, stream, scale_D).as_text().count('xla.gpu.triton') == 1
