"""Mutual information against sums over every pair, and its correction against known answers."""

import math

import numpy as np
import pytest

from moe.balance import information


def by_every_pair(joint_VE):
  """sum p(v, e) log2(p(v, e) / p(v) p(e)), pair by pair."""
  total, bits = joint_VE.sum(), 0.0
  for v, e in np.ndindex(*joint_VE.shape):
    both = joint_VE[v, e] / total
    if both:
      bits += both * math.log2(both / (joint_VE[v].sum() / total * joint_VE[:, e].sum() / total))
  return bits


def test_equals_the_sum_over_pairs():
  rng = np.random.default_rng(0)
  joint_LVE = rng.poisson(rng.gamma(0.5, 4, (5, 30, 8)))
  joint_LVE[1, 7:] = 0
  expected = [by_every_pair(joint_VE) for joint_VE in joint_LVE]
  np.testing.assert_allclose(information.mutual_information(joint_LVE), expected, rtol=1e-9)


@pytest.mark.parametrize(
  ('joint_VE', 'bits'),
  [
    (np.eye(8), 3),  # the expert is the token
    (np.ones((4, 8)), 0),  # it says nothing
    (np.kron(np.eye(2), np.ones((2, 2))), 1),  # it says which half the token is of
    (np.zeros((3, 2)), 0),
  ],
)
def test_known_answers(joint_VE, bits):
  np.testing.assert_allclose(information.mutual_information(joint_VE[None] * 5), [bits], atol=1e-12)


def test_the_bias_is_what_independent_draws_show():
  """Of tokens that say nothing of the expert, the plug-in estimate is off by `bias`, and what is left is next to 0."""
  rng, p_V, p_E = np.random.default_rng(1), np.full(20, 1 / 20), np.array([0.4, 0.3, 0.2, 0.1])
  joint_LVE = np.array([rng.multinomial(3000, np.outer(p_V, p_E).ravel()).reshape(20, 4) for _ in range(200)])
  found, bias = information.mutual_information(joint_LVE).mean(), information.bias(joint_LVE)
  np.testing.assert_allclose(bias, 19 * 3 / (2 * 3000 * math.log(2)))  # (V - 1) (E - 1) / 2N nats, as no cell is empty
  assert found == pytest.approx(bias.mean(), rel=0.05)


def test_no_counts_have_no_bias():
  np.testing.assert_allclose(information.bias(np.zeros((2, 3, 4))), 0)
  np.testing.assert_allclose(information.entropy([[0, 0], [1, 1], [4, 0]]), [0, 1, 0])
