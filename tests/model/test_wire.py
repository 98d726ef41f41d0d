"""FP8 between expert shards: what arrives at the experts is rounded as numpy rounds it, what comes home is not.

An expert multiplies its rows by a number of its own, so that the whole way there and back has a closed form.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gpus import lower_for_gpu
from jax import lax
from jax.sharding import PartitionSpec as P
from test_dispatch import LOADS, E, K, T, emulated_ragged_all_to_all

from moe.balance.routing import Routing
from moe.config import ModelConfig, PrecisionConfig
from moe.ops import fp8
from moe.ops.permute import key_of
from moe.parallel.mesh import BATCH_AXES, abstract_mesh
from moe.parallel.resolved import Resolved
from moe.registry import DISPATCHERS

MODEL = ModelConfig(num_experts=E, top_k=K)
FACTOR_E = np.linspace(-1, 2, E).astype(np.float32)
CASES = [('all_gather', {'expert': 4}), ('all_to_all', {'expert': 4}), ('ragged', {'expert': 4})]
CASES += [('all_to_all', {'data': 2, 'expert': 2}), ('all_gather', {'expert': 2, 'tensor': 2})]


def program(name, mesh, in_fp8):
  """(x, weight, expert, keep) -> y over the global arrays."""
  apply, rows = DISPATCHERS[name], P(BATCH_AXES)

  def run(x_TD, weight_TK, expert_TK, keep_TK):
    unused = jnp.zeros((len(x_TD), E))
    routing = Routing(expert_TK, weight_TK, keep_TK, jnp.zeros(E, jnp.int32), unused, unused)

    def experts(x_MD, size_e):
      first = lax.axis_index('expert') * len(size_e)
      factor_M = jnp.asarray(FACTOR_E).at[first + key_of(jnp.arange(len(x_MD)), jnp.cumsum(size_e))].get(mode='clip')
      return factor_M[:, None].astype(x_MD.dtype) * x_MD

    precision = PrecisionConfig(fp8='dispatch' if in_fp8 else '')
    resolved = Resolved(model=MODEL, dispatch=name, precision=precision, row_multiple=4)
    return apply(x_TD, routing, experts, resolved)

  return jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows)


def with_gradients(mapped):
  def run(x_TD, weight_TK, expert_TK, keep_TK, dy_TD):
    y_TD, pull = jax.vjp(lambda x, weight: mapped(x, weight, expert_TK, keep_TK), x_TD, weight_TK)
    return y_TD, *pull(dy_TD)

  return run


def inputs(load, D):
  rng = np.random.default_rng(D)
  expert_TK, keep_TK = LOADS[load](rng)
  # Some tokens a thousand times larger than others: one scale for all would lose the small ones.
  draw = lambda: (rng.normal(size=(T, D)) * 10.0 ** rng.integers(-2, 2, (T, 1))).astype(np.float32)
  return draw(), rng.uniform(0.1, 1, (T, K)).astype(np.float32), expert_TK.astype(np.int32), keep_TK, draw()


def rounded(rows):
  return oracle.quantize(np.asarray(rows, np.float32), 1, 128, power_of_two=True)[0]


def expected(name, x, weight, expert, keep, dy):
  """y and the gradients of x and weight."""
  x, factor_TK = rounded(x), np.where(keep, FACTOR_E[expert], 0).astype(np.float64)
  y = (factor_TK * weight).sum(1)[:, None] * x
  if name == 'all_gather':  # the tokens' gradients travel, and meet the gate weights at the experts
    dy = rounded(dy)
    return y, (factor_TK * weight).sum(1)[:, None] * dy, factor_TK * (x * dy).sum(1)[:, None]
  sent = [rounded(weight[:, k, None] * dy) for k in range(K)]  # a row's gradient travels, its gate weight in it
  return y, sum(factor_TK[:, k, None] * sent[k] for k in range(K)), factor_TK * (x * dy).sum(1)[:, None]


@pytest.fixture(scope='module')
def compiled(mesh_of):
  return functools.cache(
    lambda name, axes, in_fp8: jax.jit(with_gradients(program(name, mesh_of(**dict(axes)), in_fp8)))
  )


@pytest.mark.parametrize('D', [40, 200])  # within a block, and one block and a part
@pytest.mark.parametrize('load', ['uneven', 'all_to_the_last', 'masked_shards', 'nothing'])
@pytest.mark.parametrize(('name', 'axes'), CASES, ids=str)
def test_rows_are_rounded_on_their_way_to_the_experts(name, axes, load, D, compiled, monkeypatch):
  if name == 'ragged':
    monkeypatch.setattr(lax, 'ragged_all_to_all', emulated_ragged_all_to_all)
  arguments = inputs(load, D)
  actual = compiled(name, tuple(axes.items()), True)(*arguments)
  for got, want in zip(actual, expected(name, *arguments), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6 * max(1, np.abs(want).max()))


def test_rounding_is_seen(compiled):
  """Without FP8 the result differs by what rounding does, so the test above would notice its absence."""
  arguments = inputs('uneven', 200)
  plain, low = (compiled('all_to_all', (('expert', 4),), in_fp8)(*arguments) for in_fp8 in (False, True))
  y, dx, dweight = (np.linalg.norm(got - exact) / np.linalg.norm(exact) for exact, got in zip(plain, low, strict=True))
  assert 0.005 < y < 0.05
  assert 0.005 < dx < 0.05
  assert 0.005 < dweight < 0.1  # a few large tokens decide it


@pytest.mark.parametrize(('name', 'kind'), [('all_to_all', 'all_to_all'), ('ragged', 'ragged_all_to_all')])
def test_each_way_to_the_experts_is_in_bytes_and_each_way_home_is_not(name, kind):
  """Lowered for CUDA: forward one of each, backward one of each; and float32 scales, a 128th of the values."""
  T_, D = 32, 256
  make = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  mapped = with_gradients(program(name, abstract_mesh((1, 1, 4, 1)), True))
  arguments = make(T_, D), make(T_, K, dtype=jnp.float32), make(T_, K, dtype=jnp.int32), make(T_, K, dtype=bool)
  text = lower_for_gpu(jax.jit(mapped), *arguments, make(T_, D), shape=(1, 1, 4, 1)).as_text()
  sent = [
    re.search(r'tensor<\d+x(\d+)x(\w+)>', line.rsplit(' : ', 1)[1])
    for line in text.splitlines()
    if f'{kind}"(' in line or f'@{kind}(' in line
  ]
  sent = [match.groups() for match in sent if match]
  for shape, times in ((('256', 'ui8'), 2), (('2', 'f32'), 2), (('256', 'bf16'), 2)):
    assert sent.count(shape) == times, sent


def test_experts_in_fp8_do_not_round_what_came_in_fp8_once_more():
  """Both with powers of two: what the experts multiply is what numpy makes of the tokens, rounded once."""
  rng = np.random.default_rng(0)
  x_MD, w_eDF = rng.normal(size=(12, 200)).astype(np.float32), rng.normal(size=(1, 200, 96)).astype(np.float32)
  arrived_MD = rounded(x_MD).astype(np.float32)
  got = fp8.grouped_matmul(jnp.asarray(arrived_MD), jnp.asarray(w_eDF), jnp.array([12]), 'blocked', power_of_two=True)
  expected = rounded(x_MD) @ oracle.quantize(w_eDF[0], 128, 128)[0]
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
  twice = fp8.grouped_matmul(jnp.asarray(arrived_MD), jnp.asarray(w_eDF), jnp.array([12]), 'blocked')
  assert np.linalg.norm(twice - expected) > 1e-2 * np.linalg.norm(expected)
