"""Auxiliary losses on a mesh of 4 batch shards, against their formulas and finite differences.

Router logits are handed to the router directly, as tokens with an identity matrix for a router.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from moe.balance.losses import auxiliary
from moe.balance.stats import router_stats
from moe.config import BalanceConfig, Config, ModelConfig
from moe.model.router import route
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved
from moe.train import loss as losses

B, S, E, K = 8, 6, 6, 2
MODEL = ModelConfig(num_experts=E, top_k=K)
ALPHA, Z = 0.3, 0.02
BALANCES = {
  'none': BalanceConfig(aux_loss='none', aux_alpha=ALPHA),
  'switch': BalanceConfig(aux_loss='switch', aux_alpha=ALPHA, z_loss=Z),
  'switch_global': BalanceConfig(aux_loss='switch', aux_alpha=ALPHA, aux_scope='global_batch'),
  'sequence': BalanceConfig(aux_loss='sequence', aux_alpha=ALPHA, z_loss=Z),
}


@pytest.fixture(scope='module')
def compiled(mesh_of):
  """(logits, bias, mask, tokens, earlier load per shard) -> aux, z and the logits' gradients of each."""
  rows = P(BATCH_AXES)

  @functools.cache
  def compiled(name):
    config = Resolved(model=MODEL, balance=BALANCES[name])

    def local(logits_BSE, bias_E, mask_BS, tokens, earlier_E):
      logits_TE = logits_BSE.reshape(-1, E)
      routing = route(logits_TE, jnp.eye(E), bias_E, mask_BS.reshape(-1), MODEL)
      stats = jax.tree.map(lambda a: a[None], router_stats(routing, bias_E, mask_BS, config))
      return losses.sum_over_mesh(auxiliary(stats, tokens[None], earlier_E, config))

    mapped = jax.shard_map(local, mesh=mesh_of(data=2, expert=2), in_specs=(rows, P(), rows, P(), rows), out_specs=P())

    def run(logits_BSE, *rest):
      values, pull = jax.vjp(lambda logits_BSE: mapped(logits_BSE, *rest), logits_BSE)
      one = jnp.ones_like(values[0])
      return *values, pull((one, 0 * one))[0], pull((0 * one, one))[0]

    return jax.jit(run)

  return compiled


def inputs(seed=0):
  """logits, bias and mask; experts differ, the bias moves the selection, one sequence is empty."""
  rng = np.random.default_rng(seed)
  logits_BSE = rng.normal(size=(B, S, E)) + np.linspace(-1, 1, E)
  mask_BS = rng.random((B, S)) < 0.8
  mask_BS[3] = False
  return logits_BSE.astype(np.float32), (rng.normal(size=E) / 3).astype(np.float32), mask_BS


NONE_EARLIER = np.zeros((4, E), np.int32)


def load_of(logits_BSE, bias_E, mask_BS):
  routing = oracle.route(logits_BSE.reshape(-1, E), np.eye(E), bias_E, mask_BS.reshape(-1), MODEL)
  return routing.load_E


@pytest.mark.parametrize('name', BALANCES)
def test_values_and_gradients(name, compiled):
  balance, (logits, bias, mask) = BALANCES[name], inputs()
  tokens = 1.5 * mask.sum()  # the batch has more tokens than this microbatch
  earlier = np.random.default_rng(1).integers(0, 9, (4, E)).astype(np.int32)
  aux, z, daux, dz = compiled(name)(logits, bias, mask, np.float32(tokens), earlier)

  logits, bias = oracle.float64(logits), oracle.float64(bias)
  load_E = load_of(logits, bias, mask)  # held fixed: gradients flow through probabilities only
  assert (load_E != load_of(logits, 0 * bias, mask)).any()
  share = mask.sum() / tokens

  def expected_aux(logits):
    scores = oracle.sigmoid(logits)
    if name == 'none':
      return 0.0
    if name == 'sequence':
      return share * ALPHA * oracle.sequence_loss(scores, mask, K)
    total_E = load_E + earlier.sum(0) if balance.aux_scope == 'global_batch' else load_E
    return share * ALPHA * oracle.switch_loss(scores.reshape(-1, E), total_E, mask.reshape(-1))

  expected_z = lambda logits: share * balance.z_loss * np.mean(oracle.log_sum_exp(logits)[mask] ** 2)
  np.testing.assert_allclose([aux, z], [expected_aux(logits), expected_z(logits)], rtol=1e-5)
  for gradient, function in ((daux, expected_aux), (dz, expected_z)):
    np.testing.assert_allclose(gradient, oracle.numerical_gradient(function, logits), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)
  assert np.abs(daux).max() > 0 or name == 'none'


@pytest.mark.parametrize('name', ['switch', 'switch_global', 'sequence'])
def test_one_at_perfect_balance_and_more_when_skewed(name, compiled):
  cyclic = np.array([[[4.0 if (s - e) % E < K else -1.0 for e in range(E)] for s in range(S)] for _ in range(B)])
  everyone, no_bias, tokens = np.ones((B, S), bool), np.zeros(E, np.float32), np.float32(B * S)
  balanced = compiled(name)(cyclic.astype(np.float32), no_bias, everyone, tokens, NONE_EARLIER)[0]
  np.testing.assert_allclose(balanced, ALPHA, rtol=1e-5)
  same = np.tile(cyclic[:, :1], (1, S, 1))
  skewed = compiled(name)(same.astype(np.float32), no_bias, everyone, tokens, NONE_EARLIER)[0]
  assert skewed > 1.5 * ALPHA


@pytest.mark.parametrize('name', ['switch', 'sequence'])
def test_masked_tokens_do_not_matter(name, compiled):
  logits, bias, mask = inputs()
  other = np.where(mask[..., None], logits, inputs(7)[0] * 3)
  tokens = np.float32(mask.sum())
  for one, two in zip(
    compiled(name)(logits, bias, mask, tokens, NONE_EARLIER),
    compiled(name)(other, bias, mask, tokens, NONE_EARLIER),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)


def test_scopes_differ_by_the_earlier_microbatches_only(compiled):
  logits, bias, mask = inputs()
  tokens, earlier = np.float32(mask.sum()), np.full((4, E), 50, np.int32)
  run = lambda name, earlier: compiled(name)(logits, bias, mask, tokens, earlier)[0]
  assert run('switch', earlier) == run('switch', NONE_EARLIER) == run('switch_global', NONE_EARLIER)
  # So many even loads that f is uniform: the loss is 1 whatever the router says.
  np.testing.assert_allclose(run('switch_global', earlier * 1000), ALPHA, rtol=1e-3)
  assert abs(run('switch', earlier * 1000) / ALPHA - 1) > 0.02


def test_entropy_of_scores():
  """Normalised entropy, summed over unmasked tokens: 1 per token of a uniform router, near 0 of a decided one."""

  @jax.jit
  def entropy_sum(logits_E):
    routing = route(jnp.tile(logits_E, (4, 1)), jnp.eye(E), jnp.zeros(E), jnp.ones(4, bool), MODEL)
    mask_BS = jnp.asarray([[True, False, True, True]])
    return router_stats(routing, jnp.zeros(E), mask_BS, Config(model=MODEL)).entropy_sum

  np.testing.assert_allclose(entropy_sum(jnp.zeros(E)), 3, rtol=1e-5)
  np.testing.assert_allclose(entropy_sum(jnp.asarray([20.0] + [-30.0] * (E - 1))), 0, atol=1e-5)
