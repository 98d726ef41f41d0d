"""Load metrics by hand, and the noise floor against an exact simulation."""

import numpy as np
import pytest

from moe.balance import metrics

LOAD_LE = [[4, 4, 4, 4], [8, 4, 4, 0], [16, 0, 0, 0], [0, 0, 0, 0]]


# What each metric that is registered gives for LOAD_LE, by hand.
BY_HAND = {
  'max_vio': [0, 1, 3, 0],
  'cv': [0, np.sqrt(0.5), np.sqrt(3), 0],
  'load_entropy': [1, 0.75, 0, 1],  # (8, 4, 4, 0) / 16: 1.5 bits of 2
  'gini': [0, 0.375, 0.75, 0],  # (-3*0 - 4 + 4 + 3*8) / (4 * 16)
  'dead_experts': [0, 1, 3, 0],
}


def test_every_metric_has_a_row():
  assert BY_HAND.keys() == metrics.METRICS.keys()
  means = {f'{name}_batch': np.mean(value_L) for name, value_L in BY_HAND.items()}
  assert metrics.measured(LOAD_LE, 'batch') == pytest.approx(means)


@pytest.mark.parametrize(
  ('metric', 'expected'),
  [
    *((metrics.METRICS[name].of, value_L) for name, value_L in BY_HAND.items()),
    (lambda load_LE: metrics.device_imbalance(load_LE, 2), [1, 1.5, 2, 1]),
    (lambda load_LE: metrics.device_imbalance(load_LE, 1), [1, 1, 1, 1]),
  ],
)
def test_by_hand(metric, expected):
  value_L = metric(LOAD_LE)
  assert value_L.dtype == np.float64
  np.testing.assert_allclose(value_L, expected, atol=1e-12)


def test_counts_too_large_for_int32():
  load_LE = np.array([[3 * 2**40, 2**40]])
  np.testing.assert_allclose(metrics.max_vio(load_LE), [0.5])


def test_one_expert_is_balanced():
  assert metrics.entropy([[5]]) == metrics.device_imbalance([[5]], 1) == 1
  assert metrics.max_vio([[5]]) == metrics.gini([[5]]) == 0


@pytest.mark.parametrize('num_devices', [0, 3])
def test_uneven_devices(num_devices):
  with pytest.raises(ValueError, match=f'num_devices = {num_devices}'):
    metrics.device_imbalance(LOAD_LE, num_devices)


def exact_floor(tokens, num_experts, top_k, samples, rng):
  """The same expectations from routers that really pick K distinct experts for every token."""
  noise = rng.random((samples, tokens, num_experts))
  chosen = np.argpartition(noise, top_k, -1)[..., :top_k].reshape(samples, -1)
  load = np.stack([np.bincount(row, minlength=num_experts) for row in chosen])
  return metrics.max_vio(load).mean(), metrics.cv(load).mean()


@pytest.mark.parametrize(('tokens', 'num_experts', 'top_k'), [(256, 16, 4), (512, 8, 1), (400, 32, 6), (300, 8, 6)])
def test_noise_floor_is_that_of_exact_routing(tokens, num_experts, top_k):
  exact = exact_floor(tokens, num_experts, top_k, 600, np.random.default_rng(1))
  simulated = metrics.noise_floor(tokens, num_experts, top_k, samples=4000)
  np.testing.assert_allclose(simulated, exact, rtol=0.05)


@pytest.mark.parametrize(('tokens', 'num_experts', 'top_k'), [(10_000, 64, 6), (1_000_000, 256, 8)])
def test_noise_floor_cv_by_formula(tokens, num_experts, top_k):
  p = top_k / num_experts
  _, cv = metrics.noise_floor(tokens, num_experts, top_k)
  assert cv == pytest.approx(np.sqrt((1 - p) / (tokens * p)), rel=0.02)


def test_noise_floor_without_choice_is_zero():
  assert metrics.noise_floor(100, 4, 4) == metrics.noise_floor(100, 1, 1) == (0, 0)


def test_noise_floor_is_reproducible():
  assert metrics.noise_floor(100, 8, 2, seed=3) == metrics.noise_floor(100, 8, 2, seed=3)


@pytest.mark.parametrize(('tokens', 'num_experts', 'top_k'), [(0, 8, 2), (10, 8, 9), (10, 8, 0)])
def test_noise_floor_refuses_impossible_routing(tokens, num_experts, top_k):
  with pytest.raises(ValueError, match='no routing'):
    metrics.noise_floor(tokens, num_experts, top_k)
