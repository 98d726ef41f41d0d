"""Routing against the oracle, its gradient against finite differences, and what the bias may not touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moe.balance.stats import router_stats
from moe.config import BalanceConfig, Config, ModelConfig
from moe.model.router import route

T, D, E = 24, 6, 8
BASE = ModelConfig(num_experts=E, top_k=3)
MODELS = {
  'sigmoid': dataclasses.replace(BASE, route_scale=2.5),
  'softmax_raw': dataclasses.replace(BASE, score_fn='softmax', normalize_gates=False, route_scale=1.5),
  'groups': dataclasses.replace(BASE, num_groups=4, top_groups=2),
  'softmax_groups': dataclasses.replace(BASE, score_fn='softmax', num_groups=2, top_groups=1, normalize_gates=False),
  'capacity': dataclasses.replace(BASE, capacity_factor=1.1),
  'one_of_one': dataclasses.replace(BASE, num_experts=1, top_k=1),
}
MULTIPLICATIVE = BalanceConfig(bias_rule='multiplicative')


@functools.lru_cache
def compiled(model, multiplicative=False, dropless=False):
  """(x, w, bias, mask, cotangent of weight_TE) -> Routing, RouterStats and the gradients of x, w and bias."""
  config = Config(model=model, balance=MULTIPLICATIVE if multiplicative else BalanceConfig())

  def run(x_TD, w_DE, bias_E, mask_T, cotangent_TE):
    def weights(x_TD, w_DE, bias_E):
      routing = route(x_TD, w_DE, bias_E, mask_T, model, multiplicative, dropless)
      picked_TK = jnp.take_along_axis(cotangent_TE, routing.expert_TK, 1)
      return (routing.weight_TK * picked_TK).sum(), routing

    gradients, routing = jax.grad(weights, (0, 1, 2), has_aux=True)(x_TD, w_DE, bias_E)
    return routing, router_stats(routing, bias_E, mask_T[None], config), gradients

  return jax.jit(run)


def inputs(seed, model=BASE, bias_std=0.0):
  rng = np.random.default_rng(seed)
  experts = model.num_experts
  x_TD, w_DE = rng.normal(size=(T, D)), rng.normal(size=(D, experts))
  bias_E = bias_std * rng.normal(size=experts)
  return [a.astype(np.float32) for a in (x_TD, w_DE, bias_E)] + [rng.random(T) < 0.8], rng.normal(size=(T, experts))


def dense(routing, values_TK, experts=E):
  """[T, K] values at their experts in a [T, E] array; an expert listed twice would add up and be noticed."""
  out_TE = np.zeros((len(values_TK), experts), np.asarray(values_TK).dtype)
  for t, row in enumerate(np.asarray(routing.expert_TK)):
    assert len(set(row)) == len(row), f'token {t} lists an expert twice: {row}'
    out_TE[t, row] = values_TK[t]
  return out_TE


def check(arguments, model, multiplicative=False, dropless=False):
  """The compiled routing, after comparing everything in it with the oracle's."""
  routing, stats, _ = compiled(model, multiplicative, dropless)(
    *arguments, np.zeros((T, model.num_experts), np.float32)
  )
  x, w, bias, mask = arguments
  expected = oracle.route(*oracle.float64({'x': x, 'w': w, 'b': bias}).values(), mask, model, multiplicative, dropless)
  np.testing.assert_array_equal(dense(routing, np.ones((T, model.top_k), bool), model.num_experts), expected.chosen_TE)
  np.testing.assert_allclose(dense(routing, routing.weight_TK, model.num_experts), expected.weight_TE, rtol=2e-5)
  np.testing.assert_array_equal(dense(routing, routing.keep_TK, model.num_experts), expected.kept_TE)
  np.testing.assert_array_equal(routing.load_E, expected.load_E)
  np.testing.assert_allclose(routing.scores_TE, expected.scores_TE, rtol=2e-5)
  np.testing.assert_allclose(routing.logits_TE, expected.logits_TE, rtol=2e-5, atol=2e-5)
  assert routing.load_E.dtype == stats.dropped.dtype == jnp.int32
  assert stats.dropped == expected.load_E.sum() - expected.kept_TE.sum()
  return routing, expected


@pytest.mark.parametrize('bias_std', [0.0, 0.3])
@pytest.mark.parametrize('name', MODELS)
def test_equals_oracle(name, bias_std):
  model = MODELS[name]
  check(inputs(1, model, bias_std)[0], model)


@pytest.mark.parametrize('name', ['groups', 'softmax_groups'])
def test_negative_biases_never_let_a_closed_group_win(name):
  # With biases below minus the largest score, an expert of a closed group that counted as 0 would beat every open one.
  model = MODELS[name]
  x, w, bias, mask = inputs(2, model, 0.1)[0]
  routing, _ = check((x, w, bias - 3, mask), model)
  per_group = E // model.num_groups
  groups = np.asarray(routing.expert_TK) // per_group
  assert max(len(set(row)) for row in groups) <= model.top_groups


def test_multiplicative_bias():
  (x, w, _, mask), _ = inputs(3)
  factor_E = np.linspace(0.5, 2, E, dtype=np.float32)
  routing, _ = check((x, w, factor_E, mask), MODELS['sigmoid'], multiplicative=True)
  plain, _ = check((x, w, np.ones(E, np.float32), mask), MODELS['sigmoid'], multiplicative=True)
  assert (np.asarray(routing.load_E) != plain.load_E).any()


@pytest.mark.parametrize('multiplicative', [False, True])
def test_bias_never_enters_gate_weights(multiplicative):
  (x, w, bias, mask), _ = inputs(4, bias_std=0.2)
  bias = bias + 1 if multiplicative else bias
  moved = bias * 4 if multiplicative else bias + 0.5  # every score moves alike: same selection, other biased scores
  run, cotangent = compiled(MODELS['sigmoid'], multiplicative), np.zeros((T, E), np.float32)
  before, after = run(x, w, bias, mask, cotangent)[0], run(x, w, moved, mask, cotangent)[0]
  np.testing.assert_array_equal(before.expert_TK, after.expert_TK)
  np.testing.assert_array_equal(before.weight_TK, after.weight_TK)


@pytest.mark.parametrize('name', MODELS)
def test_gradients(name):
  model = MODELS[name]
  (x, w, bias, mask), cotangent = inputs(5, model, 0.2)
  _, _, (dx, dw, dbias) = compiled(model)(x, w, bias, mask, cotangent.astype(np.float32))
  x, w, bias, cotangent = (oracle.float64(a) for a in (x, w, bias, cotangent.astype(np.float32)))
  value = lambda x, w: (oracle.route(x, w, bias, mask, model, dropless=True).weight_TE * cotangent).sum()
  np.testing.assert_array_equal(dbias, 0)
  np.testing.assert_allclose(dx, oracle.numerical_gradient(lambda x: value(x, w), x), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dw, oracle.numerical_gradient(lambda w: value(x, w), w), rtol=1e-4, atol=1e-5)


def test_padding_is_neither_counted_nor_kept():
  (x, w, bias, _), _ = inputs(6)
  for mask in (np.zeros(T, bool), np.arange(T) < 5):
    routing, _ = check((x, w, bias, mask), MODELS['sigmoid'])
    assert routing.load_E.sum() == 3 * mask.sum()
    np.testing.assert_array_equal(np.asarray(routing.keep_TK).all(1), mask)


def test_capacity_keeps_the_heaviest():
  model = MODELS['capacity']  # ceil(1.1 * 24 * 3 / 8) = ceil(9.9) = 10
  (x, w, bias, mask), _ = inputs(7)
  mask[:] = True
  bias[2] = 10  # everybody's choice
  routing, _ = check((x, w, bias, mask), model)
  weight_T, kept_T = dense(routing, routing.weight_TK)[:, 2], dense(routing, routing.keep_TK)[:, 2]
  assert kept_T.sum() == 10
  assert routing.load_E[2] == T
  assert weight_T[kept_T].min() > weight_T[~kept_T].max()


def test_capacity_of_equals_keeps_the_first():
  (x, w, bias, mask), _ = inputs(8)
  x[:], mask[:] = x[0], True
  mask[1] = False
  routing, _ = check((x, w, bias, mask), MODELS['capacity'])
  np.testing.assert_array_equal(np.asarray(routing.keep_TK).all(1), [t != 1 and t < 11 for t in range(T)])


def test_dropless_ignores_capacity():
  (x, w, bias, mask), _ = inputs(9, bias_std=0.5)
  limited, _ = check((x, w, bias, mask), MODELS['capacity'])
  free, _ = check((x, w, bias, mask), MODELS['capacity'], dropless=True)
  assert limited.keep_TK.sum() < free.keep_TK.sum()
  np.testing.assert_array_equal(np.asarray(free.keep_TK).all(1), mask)


def test_large_capacity_drops_nothing():
  (x, w, bias, mask), _ = inputs(10, bias_std=5)
  routing, _ = check((x, w, bias, mask), dataclasses.replace(BASE, capacity_factor=E / 3))
  np.testing.assert_array_equal(np.asarray(routing.keep_TK).all(1), mask)
