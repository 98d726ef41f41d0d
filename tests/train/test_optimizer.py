"""AdamW against a numpy one, schedules at steps that can be told by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.config import BalanceConfig, OptimizerConfig, from_config_dict
from moe.train.optimizer import bias_speed, learning_rate, make_optimizer

STEPS = 6
# name: shape, decayed. Scales of norms stay vectors when layers are stacked in front.
PARAMETERS = {
  'w_head_DV': ((3, 4), True),
  'w_up_eDF': ((2, 2, 3, 4), True),  # [L, e, D, F]
  'w_router_DE': ((2, 3, 4), True),  # [L, D, E]
  'scale_out_D': ((4,), False),
  'scale_ffn_D': ((2, 4), False),  # [L, D]
}


def optimize(config, gradients):
  """Parameters after each step, from all ones, and the last state."""
  optimizer = make_optimizer(config, STEPS)
  params = {name: jnp.ones(shape) for name, (shape, _) in PARAMETERS.items()}
  # Nested as in the model: the mask goes by the last key.
  params = {'layers': params}
  state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
  for gradient in gradients:
    updates, state = update({'layers': gradient}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    history.append(params['layers'])
  return history, state


def random_gradients(scale=1.0):
  rng = np.random.default_rng(0)
  draw = lambda: {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, (shape, _) in PARAMETERS.items()}
  return [draw() for _ in range(STEPS)]


def adamw(config, gradients, rest=lambda a: a):
  """The same in float64; moments pass through `rest` between steps."""
  params = {name: np.ones(shape) for name, (shape, _) in PARAMETERS.items()}
  mu = {name: np.zeros(shape) for name, (shape, _) in PARAMETERS.items()}
  nu = {name: np.zeros(shape) for name, (shape, _) in PARAMETERS.items()}
  history = []
  for t, gradient in enumerate(gradients, start=1):
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    factor = min(1, config.clip_norm / norm) if config.clip_norm else 1
    for name, (_, decayed) in PARAMETERS.items():
      g = gradient[name].astype(np.float64) * factor
      m = config.beta1 * mu[name] + (1 - config.beta1) * g
      v = config.beta2 * nu[name] + (1 - config.beta2) * g**2
      direction = m / (1 - config.beta1**t) / (np.sqrt(v / (1 - config.beta2**t)) + config.eps)
      decay = config.weight_decay * params[name] if decayed else 0
      params[name] = params[name] - config.learning_rate * (direction + decay)
      mu[name], nu[name] = rest(m), rest(v)
    history.append(dict(params))
  return history


CONSTANT = OptimizerConfig(learning_rate=0.05, warmup_steps=0, decay_fraction=0.0, weight_decay=0.3, clip_norm=0.0)


@pytest.mark.parametrize(('clip_norm', 'scale'), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.01), (0.5, 100.0)])
def test_equals_numpy_adamw(clip_norm, scale):
  config = OptimizerConfig(**{**vars(CONSTANT), 'clip_norm': clip_norm, 'eps': 1e-3})
  gradients = random_gradients(scale)
  for actual, expected in zip(optimize(config, gradients)[0], adamw(config, gradients), strict=True):
    for name in PARAMETERS:
      np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, err_msg=name)


def test_only_matrices_decay():
  """Without gradients nothing but weight decay moves."""
  zeros = {name: np.zeros(shape, np.float32) for name, (shape, _) in PARAMETERS.items()}
  (params,), _ = optimize(CONSTANT, [zeros])
  for name, (_, decayed) in PARAMETERS.items():
    np.testing.assert_allclose(params[name], 1 - 0.05 * 0.3 if decayed else 1, rtol=1e-6, err_msg=name)


def test_bfloat16_moments():
  """Moments rest in bfloat16 and are float32 inside a step; the numpy moments are rounded between steps alike."""
  config, gradients = OptimizerConfig(**{**vars(CONSTANT), 'moments': 'bfloat16'}), random_gradients()
  history, state = optimize(config, gradients)
  moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  assert len(moments) == 2 * len(PARAMETERS)
  assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.bfloat16)}
  rounded = adamw(config, gradients, lambda a: a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64))
  exact = adamw(config, gradients)
  for name in PARAMETERS:
    assert history[-1][name].dtype == jnp.float32
    np.testing.assert_allclose(history[0][name], exact[0][name], rtol=1e-5, err_msg=name)  # nothing rested yet
    np.testing.assert_allclose(history[-1][name], rounded[-1][name], rtol=1e-3, err_msg=name)
  gap = max(np.abs(rounded[-1][name] - exact[-1][name]).max() for name in PARAMETERS)
  assert gap > 1e-4  # the rounding is visible at all
  assert {leaf.dtype for leaf in jax.tree.leaves(optimize(CONSTANT, gradients)[1]) if leaf.ndim} == {
    jnp.dtype('float32')
  }


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    # wsd: rises over 10 steps, stays, falls over the last 20 of 100; the end of the fall is step 100.
    ({}, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 50: 1, 80: 1, 90: 0.55, 95: 0.325, 100: 0.1}),
    ({'warmup_steps': 0}, {0: 1, 1: 1, 80: 1, 90: 0.55}),
    ({'warmup_steps': 1}, {0: 1, 1: 1, 80: 1, 90: 0.55}),
    ({'warmup_steps': 200}, {0: 0.01, 49: 0.5, 99: 1}),  # longer than the run: rises all the way
    ({'decay_fraction': 0.0}, {9: 1, 50: 1, 99: 1}),
    ({'decay_fraction': 1.0}, {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1}),  # falls right after the warm-up
    ({'decay_fraction': 1.0, 'warmup_steps': 0}, {0: 1, 50: 0.55, 100: 0.1}),
    ({'final_lr_fraction': 0.0}, {80: 1, 90: 0.5, 100: 0}),
    ({'schedule': 'cosine'}, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 55: 0.55, 40: 0.775, 100: 0.1}),
    ({'schedule': 'cosine', 'warmup_steps': 0}, {0: 1, 50: 0.55, 100: 0.1}),
    ({'schedule': 'cosine', 'warmup_steps': 100}, {0: 0.01, 49: 0.5, 99: 1}),
  ],
)
def test_learning_rate(changes, expected):
  schedule = jax.jit(learning_rate(OptimizerConfig(**({'learning_rate': 0.02, 'warmup_steps': 10} | changes)), 100))
  for step, fraction in expected.items():
    assert schedule(jnp.int32(step)) == pytest.approx(0.02 * fraction, rel=1e-5, abs=1e-9), step


def test_the_first_step_learns_at_the_scheduled_rate():
  """Adam's first step has length one per component, so the parameters tell the rate."""
  config = OptimizerConfig(**{**vars(CONSTANT), 'weight_decay': 0.0, 'warmup_steps': 5, 'decay_fraction': 1.0})
  ones = {name: np.ones(shape, np.float32) for name, (shape, _) in PARAMETERS.items()}
  history, _ = optimize(config, [ones] * 5)
  lengths = -np.diff([1.0] + [float(params['scale_out_D'][0]) for params in history])
  np.testing.assert_allclose(lengths, 0.05 * np.array([0.2, 0.4, 0.6, 0.8, 1.0]), rtol=1e-4)


@pytest.mark.parametrize(('fraction', 'last'), [(0.0, 50), (0.1, 45), (0.034, 48), (1.0, 0)])
def test_bias_speed(fraction, last):
  speed = bias_speed(BalanceConfig(gamma=0.25, gamma_off_fraction=fraction), 50)
  values = jax.jit(jax.vmap(speed))(jnp.arange(50))
  assert values.dtype == jnp.float32
  np.testing.assert_array_equal(values, np.where(np.arange(50) < last, 0.25, 0))


@pytest.mark.parametrize(
  ('off', 'decay', 'final', 'expected'),
  [
    (0.2, 0.4, 0.0, [0.5] * 5 + [0.375, 0.25, 0.125, 0, 0]),
    (0.0, 0.4, 0.5, [0.5] * 7 + [0.4375, 0.375, 0.3125]),
    (0.5, 0.5, 0.2, [0.5, 0.42, 0.34, 0.26, 0.18] + [0] * 5),
  ],
)
def test_bias_speed_falls_before_it_is_0(off, decay, final, expected):
  config = BalanceConfig(gamma=0.5, gamma_off_fraction=off, gamma_decay_fraction=decay, gamma_final_fraction=final)
  np.testing.assert_allclose(jax.jit(jax.vmap(bias_speed(config, 10)))(jnp.arange(10)), expected, rtol=1e-6)


def test_settings_at_their_borders_are_finite():
  """The last that are not refused, on gradients of every size: 0, and such that their squares are 0 in float32."""
  borders = {'beta1': 0.999999, 'beta2': 0.999999, 'eps': 1e-18, 'clip_norm': 0.0, 'warmup_steps': 0}
  from_config_dict({'optimizer': borders})
  sizes = np.float32([0, 1e-30, 1e-20, 1e-10, 1e-5, 1, 1e5, 1e15])
  gradient = {name: np.resize(sizes, shape) for name, (shape, _) in PARAMETERS.items()}
  history, _ = optimize(OptimizerConfig(**borders), [gradient] * 3)
  for params in history:
    assert all(np.isfinite(value).all() and np.abs(value).max() < 2 for value in params.values())
