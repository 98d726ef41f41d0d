"""Attention and rotary positions against the oracle; who sees whom; YaRN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from moe.config import Config, ModelConfig, PrecisionConfig
from moe.model import rope
from moe.model.parameters import Init
from moe.registry import ATTENTIONS

B, S, D = 2, 9, 8
MLA = ModelConfig(d_model=D, num_heads=3, q_lora_rank=0, kv_lora_rank=5, qk_nope_dim=4, qk_rope_dim=6, v_dim=2)
MODELS = {
  'mla': MLA,
  'mla_query_latent_yarn': dataclasses.replace(MLA, q_lora_rank=7, yarn_factor=8.0, yarn_original_len=32),
  'mha': dataclasses.replace(MLA, attention='mha', qk_nope_dim=0),
}
# Two documents and padding; one document that ends in the middle of another one's positions.
SEGMENT_BS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3, 4]])


def attention(name):
  return ATTENTIONS[MODELS[name].attention].module(MODELS[name], Init(nnx.Rngs(0), 1.0))


@functools.lru_cache
def parameters(name):
  """Random parameters, the norms' scales too."""
  rng, graph = np.random.default_rng(3), nnx.eval_shape(lambda: attention(name))
  shapes = nnx.to_pure_dict(nnx.state(graph))
  draw = lambda key, leaf: (1 if key.startswith('scale') else 0) + rng.normal(size=leaf.shape) / 2
  return {key: draw(key, leaf).astype(np.float32) for key, leaf in shapes.items()}


@pytest.fixture(scope='module')
def compiled(module_of):
  """(params, x, cotangent) -> y and the gradients of params and x, for SEGMENT_BS."""

  @functools.cache
  def compiled(name):
    def run(params, x_BSD, cotangent_BSD):
      module = lambda params: module_of(lambda: attention(name), params)
      apply = lambda params, x_BSD: module(params)(x_BSD, jnp.asarray(SEGMENT_BS), Config(grouped_matmul='blocked'))
      y_BSD, pull = jax.vjp(apply, params, x_BSD)
      return y_BSD, *pull(cotangent_BSD)

    return jax.jit(run)

  return compiled


def inputs(seed=0):
  x_BSD, cotangent_BSD = np.random.default_rng(seed).normal(size=(2, B, S, D)).astype(np.float32)
  return x_BSD, cotangent_BSD


@pytest.mark.parametrize('name', MODELS)
def test_equals_oracle(name, compiled):
  params, (x, cotangent) = parameters(name), inputs()
  y, dparams, dx = compiled(name)(params, x, cotangent)
  w, x, cotangent = oracle.float64(params), oracle.float64(x), oracle.float64(cotangent)
  forward = lambda w, x: oracle.attention(x, SEGMENT_BS, w, MODELS[name])
  np.testing.assert_allclose(y, forward(w, x), rtol=2e-5, atol=2e-5)

  # Derivatives along random directions: of x, and of each parameter by itself.
  rng, step = np.random.default_rng(1), 1e-6

  def check(gradient, function, at):
    direction = rng.normal(size=at.shape)
    up, down = ((function(at + sign * step * direction) * cotangent).sum() for sign in (1, -1))
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
    np.testing.assert_allclose((gradient * direction).sum(), (up - down) / (2 * step), rtol=0, atol=1e-5 * scale)

  check(dx, lambda moved: forward(w, moved), x)
  assert w.keys() == dparams.keys()
  for key in w:
    assert np.linalg.norm(dparams[key]) > 0
    check(dparams[key], lambda moved, key=key: forward(w | {key: moved}, x), w[key])


@pytest.mark.parametrize('name', MODELS)
def test_sees_only_earlier_positions_of_its_segment(name, compiled):
  params, (x, cotangent) = parameters(name), inputs()
  for b in range(B):
    for position in range(S):
      only = np.zeros_like(cotangent)
      only[b, position] = cotangent[b, position]
      seen_BS = np.abs(compiled(name)(params, x, only)[2]).max(-1) > 0
      expected_BS = np.zeros((B, S), bool)
      expected_BS[b, : position + 1] = SEGMENT_BS[b, : position + 1] == SEGMENT_BS[b, position]
      np.testing.assert_array_equal(seen_BS, expected_BS)


@pytest.mark.parametrize('name', MODELS)
def test_fp8_projections(name, module_of):
  """Close to the exact ones, and every weight was rounded: none of their blocks' gradients is the exact one."""
  params, (x, cotangent) = parameters(name), inputs()

  def run(fp8):
    config = Config(grouped_matmul='blocked', precision=PrecisionConfig(fp8=fp8))
    apply = lambda params, x: module_of(lambda: attention(name), params)(x, jnp.asarray(SEGMENT_BS), config)

    def with_gradients(params, x, cotangent):
      y, pull = jax.vjp(apply, params, x)
      return y, *pull(cotangent)

    return jax.jit(with_gradients)(params, x, cotangent)

  (y, dparams, dx), (exact_y, exact_dparams, exact_dx) = run('attention'), run('experts,ffn')
  distance = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
  assert 1e-3 < distance(y, exact_y) < 0.2
  assert 1e-3 < distance(dx, exact_dx) < 0.2
  for key in params:
    assert 1e-4 < distance(dparams[key], exact_dparams[key]) < 0.3, key


# ---------------------------------------------------------------------------------------------------- rotary positions

YARN = dataclasses.replace(
  MLA, qk_rope_dim=64, yarn_factor=40.0, yarn_original_len=4096, yarn_beta_fast=32.0, yarn_beta_slow=1.0
)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'yarn_factor': 1.0},
    {'yarn_factor': 4.0, 'yarn_original_len': 256},
    {'rope_theta': 500000.0, 'yarn_original_len': 8192},
    {'qk_rope_dim': 4, 'yarn_original_len': 64},
    {'yarn_beta_fast': 8.0, 'yarn_beta_slow': 7.9},
  ],
)
def test_frequencies(changes):
  model = dataclasses.replace(YARN, **changes)
  pairs = model.qk_rope_dim // 2
  expected = oracle.yarn_frequencies(
    pairs, model.rope_theta, model.yarn_factor, model.yarn_original_len, model.yarn_beta_fast, model.yarn_beta_slow
  )
  np.testing.assert_allclose(rope.frequencies(model), expected, rtol=1e-9)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
  """The paper's definition by turns over the original length; the ramp lies between."""
  plain = rope.frequencies(dataclasses.replace(YARN, yarn_factor=1.0))
  turns, slowdown = 4096 * plain / (2 * np.pi), plain / rope.frequencies(YARN)
  assert 0 < (turns > 32).sum() < 32
  np.testing.assert_allclose(slowdown[turns > 32], 1)
  np.testing.assert_allclose(slowdown[turns < 1], 40)
  between = slowdown[(turns <= 32) & (turns >= 1)]
  assert (np.diff(between) > 0).all()
  assert between.min() >= 1
  assert between.max() < 40


def test_softmax_scale():
  # DeepSeek-V3: 128 + 64 dims, factor 40: 192^-0.5 * (0.1 ln 40 + 1)^2.
  model = dataclasses.replace(YARN, qk_nope_dim=128)
  assert rope.softmax_scale(model) == pytest.approx(192**-0.5 * 1.3688879454113936**2, rel=1e-12)
  assert rope.softmax_scale(dataclasses.replace(model, yarn_factor=1.0)) == pytest.approx(192**-0.5, rel=1e-12)
  halved = dataclasses.replace(model, yarn_mscale=0.5)
  assert rope.softmax_scale(halved) == pytest.approx(192**-0.5 * 1.1844439727056968**2, rel=1e-12)


@pytest.mark.parametrize('factor', [1.0, 40.0])
def test_rotation_is_relative_and_keeps_norms(factor):
  model = dataclasses.replace(YARN, qk_rope_dim=8, yarn_factor=factor, yarn_original_len=32)
  rng, length = np.random.default_rng(0), 40
  query, key = rng.normal(size=(2, 8))
  tile = lambda vector: jnp.asarray(np.tile(vector, (1, length, 1, 1)), jnp.float32)
  turned_q, turned_k = (np.asarray(rope.rotate(tile(vector), model), np.float64)[0, :, 0] for vector in (query, key))
  np.testing.assert_allclose(np.linalg.norm(turned_q, axis=-1), np.linalg.norm(query), rtol=1e-6)
  products = turned_q @ turned_k.T
  for distance in range(-20, 20):
    diagonal = np.diagonal(products, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
  assert np.ptp(products[0]) > 0.3  # and they do depend on the distance
  np.testing.assert_allclose(turned_q, oracle.rope(np.tile(query, (length, 1)), rope.frequencies(model)), atol=1e-5)


def test_rotation_keeps_dtype_and_position_zero():
  x_BSHR = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 2, 6)), jnp.bfloat16)
  turned_BSHR = rope.rotate(x_BSHR, MLA)
  assert turned_BSHR.dtype == jnp.bfloat16
  np.testing.assert_array_equal(turned_BSHR[:, 0], x_BSHR[:, 0])
