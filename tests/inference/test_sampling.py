"""What tokens are drawn with, against plain numpy; and that speculation draws from the model's own distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.errors import UserError
from moe.inference.sampling import Sampling, distribution, draw, keys
from moe.inference.steps import check_drafts


def by_numpy(logits, how):
  """Sorts, cuts and renormalises one row, in the order of the definition."""
  if how.temperature == 0:
    return np.eye(len(logits))[logits.argmax()]
  probs = np.exp(logits / how.temperature - (logits / how.temperature).max())
  order = np.argsort(-probs)
  kept = order[: how.top_k or None]
  inside = probs[kept] / probs[kept].sum()
  needed = 1 + int((np.cumsum(inside)[:-1] < how.top_p).sum())
  result = np.zeros_like(probs)
  result[kept[:needed]] = probs[kept[:needed]]
  return result / result.sum()


@pytest.mark.parametrize(
  'how', [(0, 0, 1), (0.7, 0, 1), (1.3, 5, 1), (0.9, 0, 0.8), (2.0, 7, 0.5), (1.0, 1, 1), (1.0, 99, 0.01)]
)
def test_distribution(how):
  how = Sampling(*how)
  logits_BV = np.random.default_rng(1).normal(size=(6, 23)).astype(np.float32)
  got = distribution(jnp.asarray(logits_BV), how)
  want = [by_numpy(row, how) for row in logits_BV.astype(np.float64)]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_ties_at_a_limit_all_stay():
  logits_V = jnp.log(jnp.array([0.1, 0.2, 0.1, 0.2, 0.4]))
  for how, kept in ((Sampling(1.0, 2), [1, 3, 4]), (Sampling(1.0, 0, 0.5), [1, 3, 4]), (Sampling(1.0, 1), [4])):
    assert np.flatnonzero(distribution(logits_V, how)).tolist() == kept


def test_top_p_that_is_reached_exactly_takes_no_more():
  """The fewest tokens that hold it: once they do, the next one stays out, as in numpy."""
  logits_V = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))
  before_V = jnp.cumsum(jax.nn.softmax(logits_V)) - jax.nn.softmax(logits_V)
  for kept in (1, 2, 3):
    top_p = float(before_V[kept])  # what the likelier ones hold, to the last bit
    found_V = distribution(logits_V, Sampling(1.0, 0, top_p))
    assert np.flatnonzero(found_V).tolist() == list(range(kept))
    assert (
      len(np.flatnonzero(distribution(logits_V, Sampling(1.0, 0, np.nextafter(top_p, 1, dtype=np.float32))))) > kept
    )


@pytest.mark.parametrize(
  ('how', 'says'),
  [
    ((-0.1, 0, 1.0), 'temperature'),
    ((1e-9, 0, 1.0), 'temperature'),
    ((float('nan'), 0, 1.0), 'temperature'),
    ((1.0, -1, 1.0), 'top_k'),
    ((1.0, 0, 0.0), 'top_p'),
    ((1.0, 0, 1.1), 'top_p'),
  ],
)
def test_bad_settings(how, says):
  with pytest.raises(UserError, match=says):
    Sampling(*how)


def test_draws_follow_the_distribution():
  """Chi-square of 40,000 draws over 6 tokens, one of which has no chance: below the 99.9% point of 4 degrees, 18.5."""
  probs_V, n = np.array([0.5, 0.2, 0.15, 0.1, 0.05, 0]), 40_000
  at = keys(jnp.arange(n, dtype=jnp.uint32), jnp.zeros(n, jnp.int32), 0)
  token_N = draw(jnp.broadcast_to(probs_V, (n, 6)), at)
  count_V = np.bincount(token_N, minlength=6)
  assert count_V[5] == 0
  assert ((count_V[:5] - n * probs_V[:5]) ** 2 / (n * probs_V[:5])).sum() < 18.5


def test_speculation_keeps_the_distribution():
  """Drafts come from q, and what is said from p: the first token's frequencies, and the second's after each first."""
  rng, n, V = np.random.default_rng(2), 60_000, 4
  p_KV = rng.dirichlet(np.ones(V), 3).astype(np.float32)
  q_kV = rng.dirichlet(np.ones(V), 2).astype(np.float32)
  seed_B, zero_B = jnp.arange(n, dtype=jnp.uint32), jnp.zeros(n, jnp.int32)
  many = lambda probs: jnp.broadcast_to(probs, (n, *probs.shape))
  draft_Bk = jnp.stack([draw(many(q_kV[i]), keys(seed_B, zero_B + 1 + i, 1)) for i in range(2)], axis=1)
  accepted_B, next_BK = check_drafts(many(p_KV), many(q_kV), draft_Bk, seed_B, zero_B)
  said = np.arange(3) <= np.asarray(accepted_B)[:, None]
  for place in range(3):
    token = np.asarray(next_BK)[said[:, place], place]
    expected = len(token) * p_KV[place]
    count = np.bincount(token, minlength=V)
    assert ((count - expected) ** 2 / expected).sum() < 16.3  # 99.9% point of 3 degrees
  # A draft stays with the probability that two draws can agree on.
  assert abs((np.asarray(accepted_B) >= 1).mean() - np.minimum(p_KV[0], q_kV[0]).sum()) < 4 * 0.5 / np.sqrt(n)


def test_certain_drafts_stay_if_they_are_right():
  one_hot = lambda *tokens: jax.nn.one_hot(jnp.array([tokens]), 5)
  at = jnp.zeros(1, jnp.uint32), jnp.zeros(1, jnp.int32)
  for drafts, accepted, said in (((1, 2), 2, [1, 2, 3]), ((1, 4), 1, [1, 2]), ((0, 2), 0, [1])):
    accepted_B, next_BK = check_drafts(one_hot(1, 2, 3), one_hot(*drafts), jnp.array([drafts]), *at)
    assert accepted_B[0] == accepted
    assert next_BK[0, : accepted + 1].tolist() == said
