"""Bias rules by hand, at their limits, and in a closed loop with a skewed router."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moe.balance import rules
from moe.balance.routing import Routing
from moe.balance.rules import quantile
from moe.config import BalanceConfig, ModelConfig
from moe.errors import UserError
from moe.registry import BIAS_RULES

T, E, K = 1024, 8, 2
NO_MARGINS = np.zeros((1, 4, 0), np.int32)
LOAD_LE = np.array([[10, 2, 4, 8]], np.int32)  # mean 6
SKEWED_LE = np.array([[9, 1, 1, 1]], np.int32)  # mean 3


@functools.lru_cache
def compiled(balance):
  return jax.jit(lambda state, load_LE, margins, gamma: rules.update(state, load_LE, margins, gamma, balance))


def step(rule, load_LE, state=None, gamma=0.5, margins=NO_MARGINS, fastest=None, **constants):
  balance = BalanceConfig(bias_rule=rule, gamma=fastest or gamma, **constants)
  state = rules.init(balance, *load_LE.shape) if state is None else state
  return compiled(balance)(state, jnp.asarray(load_LE), jnp.asarray(margins), jnp.float32(gamma))


histogram = jax.jit(lambda scores_TE, bias_E, mask_T: quantile.margin_histogram(scores_TE, bias_E, mask_T, K))


def margins_of(scores_TE, bias_E, mask_T=None):
  mask_T = np.ones(len(scores_TE), bool) if mask_T is None else mask_T
  return histogram(scores_TE, bias_E, mask_T)


def statistic_of(rule, scores_TE, bias_E):
  """What a rule counts of these tokens, [1, E, ...]."""
  routing = Routing(None, None, None, None, jnp.asarray(scores_TE), None)
  count = BIAS_RULES[rule].statistic
  return count(routing, jnp.asarray(bias_E), jnp.ones(len(scores_TE), bool), ModelConfig(num_experts=E, top_k=K))[None]


def no_statistic(rule, num_routers, num_experts):
  one = statistic_of(rule, np.zeros((1, E)), np.zeros(E))
  return np.zeros((num_routers, num_experts, *one.shape[2:]), np.int32)


def neutral(rule):
  return 1.0 if BIAS_RULES[rule].factor else 0.0


def choose(biased_TE):
  """int32 loads [1, E] of a top-k router."""
  chosen = np.argsort(-biased_TE, axis=1, kind='stable')[:, :K]
  return np.bincount(chosen.reshape(-1), minlength=E).astype(np.int32)[None]


def skewed_scores(seed=0):
  """Scores of a router that prefers some experts by far."""
  rng = np.random.default_rng(seed)
  return oracle.sigmoid(rng.normal(size=(T, E)) + np.linspace(-1.5, 1.5, E)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
  ('rule', 'load_LE', 'moves'),
  [
    ('none', LOAD_LE, [0, 0, 0, 0]),
    ('sign', LOAD_LE, [-1, 1, 1, -1]),
    ('sign', SKEWED_LE, [-1, 1, 1, 1]),
    ('sign', np.array([[3, 5, 4, 4]], np.int32), [1, -1, 0, 0]),
    ('centered_sign', SKEWED_LE, [-1.5, 0.5, 0.5, 0.5]),
    ('proportional', LOAD_LE, [-2 / 3, 2 / 3, 1 / 3, -1 / 3]),
    ('rms', LOAD_LE, np.array([-4, 4, 2, -2]) / np.sqrt(10)),
    ('multiplicative', LOAD_LE, [-1, 1, 1, -1]),
  ],
)
def test_one_step(rule, load_LE, moves):
  start = neutral(rule)
  state = step(rule, load_LE, gamma=0.5)
  np.testing.assert_allclose(state['bias_LE'], start + 0.5 * np.array([moves]), rtol=1e-6)
  # The next step starts from there, on each layer by itself.
  both = rules.start(BalanceConfig(bias_rule=rule), jnp.concatenate([state['bias_LE'], jnp.zeros((1, 4))]))
  after = step(rule, np.concatenate([load_LE, load_LE[:, ::-1]]), both, gamma=0.25)['bias_LE']
  np.testing.assert_allclose(after[0], start + 0.75 * np.array(moves), rtol=1e-6)
  np.testing.assert_allclose(after[1], 0.25 * np.array(moves)[::-1], rtol=1e-6)


def test_smebu_steps():
  state, bias, momentum = None, np.zeros(4), np.zeros(4)
  for load in ([10, 2, 4, 8], [9, 1, 1, 1], [0, 0, 12, 0]):
    state = step('smebu', np.array([load], np.int32), state, 0.5, smebu_kappa=1.5, smebu_beta=0.75)
    violation = (np.mean(load) - np.array(load)) / np.mean(load)
    clamped = 0.5 * np.tanh(1.5 * violation)
    momentum = 0.75 * momentum + 0.25 * (clamped - clamped.mean())
    bias = bias + momentum
    np.testing.assert_allclose(state['bias_LE'][0], bias, rtol=1e-5)
    np.testing.assert_allclose(state['momentum_LE'][0], momentum, rtol=1e-5)


@pytest.mark.parametrize('rule', [rule for rule in BIAS_RULES if rule != 'none'])
def test_overloaded_goes_down(rule):
  scores = skewed_scores()
  load_LE, bias_E = choose(scores), np.zeros(E, np.float32)
  balance = BalanceConfig(bias_rule=rule)
  start = rules.init(balance, 1, E)
  new = step(rule, load_LE, start, 0.01, statistic_of(rule, scores, bias_E))
  moved_E = np.asarray(new['bias_LE'] - start['bias_LE'])[0]
  assert moved_E[load_LE[0].argmax()] == moved_E.min()
  assert moved_E[load_LE[0].argmax()] < 0 < moved_E[load_LE[0].argmin()]


# ------------------------------------------------------------------------------------------------------------ limits


def test_initial_state():
  for rule in BIAS_RULES:
    state = rules.init(BalanceConfig(bias_rule=rule), 3, 4)
    np.testing.assert_array_equal(state['bias_LE'], np.full((3, 4), neutral(rule)))
    assert state['bias_LE'].dtype == jnp.float32
    after = step(rule, np.ones((3, 4), np.int32), state, 0.1, no_statistic(rule, 3, 4))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


@pytest.mark.parametrize('rule', BIAS_RULES)
def test_gamma_zero_leaves_the_state_untouched(rule):
  scores, bias_E = skewed_scores(), np.zeros(E, np.float32)
  statistic = statistic_of(rule, scores, bias_E)
  moved = step(rule, choose(scores), None, 0.01, statistic)
  still = step(rule, choose(scores), moved, 0.0, statistic)
  assert moved.keys() == still.keys()
  for key in moved:
    np.testing.assert_array_equal(still[key], moved[key])
  if rule != 'none':
    assert np.abs(moved['bias_LE'] - rules.init(BalanceConfig(bias_rule=rule), 1, E)['bias_LE']).max() > 0


@pytest.mark.parametrize('rule', BIAS_RULES)
def test_no_load_moves_nothing(rule):
  """From any bias that a run may start with, whatever else the rule remembers."""
  bias_LE = jnp.asarray([[0.5, -0.25, 0.0, -0.25]])
  state = rules.start(BalanceConfig(bias_rule=rule), bias_LE)
  np.testing.assert_array_equal(state['bias_LE'], bias_LE)
  assert state.keys() == rules.init(BalanceConfig(bias_rule=rule), 1, 4).keys()
  for load_LE, gamma in ((np.zeros((1, 4), np.int32), 0.1), (LOAD_LE, 0.0)):
    after = step(rule, load_LE, state, gamma, no_statistic(rule, 1, 4))
    assert after.keys() == state.keys()
    for key in state:
      np.testing.assert_array_equal(after[key], state[key])


@pytest.mark.parametrize('rule', BIAS_RULES)
def test_a_factor_is_not_a_summand(rule):
  """A bias around 0 of any other rule would multiply all scores away."""
  assert rules.check_start(rule, rule) is None
  for theirs in BIAS_RULES:
    if (rule == 'multiplicative') == (theirs == 'multiplicative'):
      assert rules.check_start(rule, theirs) is None
    else:
      with pytest.raises(UserError, match=f"'{rule}' cannot start from a run with '{theirs}'"):
        rules.check_start(rule, theirs)


@pytest.mark.parametrize('num_experts', [3, 4])
@pytest.mark.parametrize('rule', ['sign', 'proportional', 'rms', 'multiplicative'])
def test_huge_counts_keep_their_signs(rule, num_experts):
  """Loads around 5e8 that differ by a few tokens, which float32 cannot tell apart, up to ones that differ by much."""
  rng = np.random.default_rng(5)
  spread = 10.0 ** rng.integers(0, 8, (200, 1))
  load_LE = (5e8 - rng.uniform(0, 1, (200, num_experts)) * spread).astype(np.int32)
  start = neutral(rule)
  moves = np.asarray(step(rule, load_LE, None, 0.5)['bias_LE'], np.float64) - start
  exact = load_LE.astype(object).sum(1, keepdims=True) - num_experts * load_LE.astype(object)  # Python integers
  np.testing.assert_array_equal(np.sign(moves), np.sign(exact.astype(np.float64)))


# ---------------------------------------------------------------------------------------------------------- quantile


@pytest.mark.parametrize(('lowest', 'highest', 'outermost'), [(-1100, -300, -1), (300, 1100, 0)])
def test_margin_histogram(lowest, highest, outermost):
  """Scores and biases on a grid that float32 and the bins (1024 per unit) represent exactly."""
  rng = np.random.default_rng(0)
  scores_TE = (rng.permuted(np.tile(np.arange(512), (60, 1)), axis=1)[:, :E] / 512).astype(np.float32)
  bias_E = (rng.integers(lowest, highest, E) / 512).astype(np.float32)
  mask_T = rng.random(60) < 0.7
  expected = np.zeros((E, quantile.MARGIN_BINS), int)
  for scores in scores_TE[mask_T]:
    alpha = sorted(scores + bias_E)[-K - 1]  # the best biased score that was not chosen
    for e, score in enumerate(scores):
      expected[e, min(max(int((score - alpha + 1) * 1024), 0), 2047)] += 1
  whole = margins_of(scores_TE, bias_E, mask_T)
  assert whole.dtype == jnp.int32
  np.testing.assert_array_equal(whole, expected)
  assert expected[:, outermost].any()  # some margins lie outside the range
  halves = [margins_of(scores_TE[part], bias_E, mask_T[part]) for part in (slice(0, 30), slice(30, 60))]
  np.testing.assert_array_equal(whole, halves[0] + halves[1])


def test_quantile_bias_is_the_quantile():
  """Margins spread evenly over (0, 0.5): a target of a quarter of the tokens is exceeded at 0.375, and so on."""
  margins = np.zeros((1, 4, quantile.MARGIN_BINS), np.int32)
  low = np.array([0.0, -0.5, 0.25, 0.0])
  for e in range(4):
    first = round((low[e] + 1) * 1024)
    margins[0, e, first : first + 512] = 2  # 1024 tokens
  load_LE = np.array([[1024, 0, 0, 0]], np.int32)  # mean 256: a quarter
  bias = np.asarray(step('quantile', load_LE, None, 0.001, margins)['bias_LE'])[0]
  thresholds = low + 0.375
  np.testing.assert_allclose(bias, -thresholds + thresholds.mean(), atol=1e-6)
  np.testing.assert_allclose(bias.sum(), 0, atol=1e-6)


def test_quantile_ema_goes_part_of_the_way():
  """A share of the way to what the rule proposes, from wherever the bias is; all of it by default."""
  scores = skewed_scores()
  start = {'bias_LE': jnp.asarray(np.linspace(-0.1, 0.1, E, dtype=np.float32)[None])}
  margins, load_LE = margins_of(scores, start['bias_LE'][0])[None], choose(scores)
  whole = np.asarray(step('quantile', load_LE, start, 0.1, margins)['bias_LE'], np.float64)
  quarter = 0.75 * np.asarray(start['bias_LE'], np.float64) + 0.25 * whole
  for part in (
    step('quantile', load_LE, start, 0.1, margins, quantile_ema=0.75),
    step('quantile', load_LE, start, 0.025, margins, fastest=0.1),  # gamma has fallen to a quarter
    step('quantile', load_LE, start, 0.05, margins, fastest=0.1, quantile_ema=0.5),
  ):
    np.testing.assert_allclose(part['bias_LE'], quarter, rtol=1e-5, atol=1e-8)


def test_quantile_evens_out_the_same_tokens():
  scores = skewed_scores()
  state, violations = None, [oracle.max_vio(choose(scores)[0])]
  for _ in range(12):
    bias_LE = np.zeros((1, E), np.float32) if state is None else np.asarray(state['bias_LE'])
    state = step('quantile', choose(scores + bias_LE), state, 0.001, margins_of(scores, bias_LE[0])[None])
    violations.append(oracle.max_vio(choose(scores + np.asarray(state['bias_LE']))[0]))
  assert violations[0] > 1.5
  assert violations[1] < 0.5  # the thresholds that the first proposal used were those of the old bias
  assert violations[-1] < 0.03


# ------------------------------------------------------------------------------------------------------- closed loop


@pytest.mark.parametrize(
  ('rule', 'gamma'),
  [
    ('sign', 0.005),
    ('centered_sign', 0.005),
    ('proportional', 0.02),
    ('rms', 0.005),
    ('smebu', 0.02),
    ('multiplicative', 0.01),
  ],
)
def test_closed_loop_balances_a_skewed_router(rule, gamma):
  scores, state, violation = skewed_scores(1), None, []
  for _ in range(250):
    bias_LE = rules.init(BalanceConfig(bias_rule=rule), 1, E)['bias_LE'] if state is None else state['bias_LE']
    bias_E = np.asarray(bias_LE)[0]
    load_LE = choose(scores * bias_E if BIAS_RULES[rule].factor else scores + bias_E)
    violation.append(oracle.max_vio(load_LE[0]))
    state = step(rule, load_LE, state, gamma, statistic_of(rule, scores, bias_E))
  assert violation[0] > 1
  assert max(violation[-50:]) < 0.1
