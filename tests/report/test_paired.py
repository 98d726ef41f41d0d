"""Differences between variants and means adjusted for seeds, against closed forms and a regression."""

import math

import numpy as np
import pytest

from moe.report import paired


def test_paired_by_hand():
  gap = paired.difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])  # differences 1, 2, 3
  assert gap.mean == 2
  half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%
  assert (gap.low, gap.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
  t = 2 * math.sqrt(3)
  assert gap.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form for 2 degrees of freedom
  assert paired.difference([1.0], [1.5]) == (1, 0.5, None, None, None)
  assert paired.difference([], []) is None
  assert paired.difference([1.0, 2.0], [1.0, 2.0]).p == 1
  assert paired.difference([1.0, 2.0], [2.0, 3.0]) == (2, 1, 1, 1, 0)


def test_adjusted_means_of_equal_seeds_are_the_means():
  """With the closed forms of a two-way analysis of variance."""
  values = np.random.default_rng(0).normal(size=(3, 4))
  runs = [(v, s) for v in range(3) for s in range(4)]
  found = paired.adjusted('a', ['abc'[v] for v, _ in runs], [s for _, s in runs], [values[run] for run in runs])
  noise = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
  error = math.sqrt((noise**2).sum() / (2 * 3) * 2 / 4)
  assert [mean for mean, _, _ in found.values()] == pytest.approx(values.mean(1))
  assert [gap for _, gap, _ in found.values()] == pytest.approx(values.mean(1) - values[0].mean())
  assert [error for _, _, error in found.values()] == pytest.approx([0, error, error])


def test_adjusted_means_are_those_of_a_regression():
  """Of variants with other numbers of seeds, by the covariance that textbooks have; b and d share no seed."""
  runs = [*(('a', s) for s in range(5)), ('b', 0), ('b', 1), ('c', 3), ('c', 1), ('c', 2), ('d', 4)]
  values = np.random.default_rng(1).normal(size=len(runs)) + [10 * s for _, s in runs]
  found = paired.adjusted('b', *zip(*runs, strict=True), values)
  # Columns: the mean of a over all seeds, how far b, c and d are above a, and seeds 1 to 4 above the mean of all.
  design = np.array(
    [[1.0, *(v == name for name in 'bcd'), *((s == i) - (s == 0) for i in range(1, 5))] for v, s in runs]
  )
  fitted, (squares,), _, _ = np.linalg.lstsq(design, values)
  covariance = np.linalg.inv(design.T @ design) * squares / (len(runs) - 8)
  a_above_b, c_above_b = np.array([0, -1, 0, 0, 0, 0, 0, 0]), np.array([0, -1, 1, 0, 0, 0, 0, 0])
  assert [found[v].mean for v in 'abcd'] == pytest.approx(fitted[0] + np.array([0, *fitted[1:4]]))
  for name, contrast in (('a', a_above_b), ('c', c_above_b)):
    error = math.sqrt(contrast @ covariance @ contrast)
    assert found[name][1:] == (pytest.approx(contrast @ fitted), pytest.approx(error))
  assert found['b'][1:] == (0, 0)


def test_adjusted_means_without_enough_runs():
  one_seed = paired.adjusted('a', ['a', 'b'], [0, 0], [1.0, 3.0])
  assert one_seed == {'a': (1, 0, None), 'b': (3, 2, None)}
  apart = paired.adjusted('a', ['a', 'a', 'b', 'b', 'c', 'c'], [0, 1, 2, 3, 1, 0], [1.0, 2.0, 5.0, 7.0, 3.0, 2.5])
  assert apart['b'] == (6, None, None)  # no seed is shared: the plain mean
  assert apart['c'][:2] == (2.75, 1.25)
  assert paired.adjusted('z', ['a'], [0], [1.0]) == {'a': (1, None, None)}


def test_holm_by_hand():
  # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to the one before), 0.9 * 1.
  assert paired.holm([0.03, None, 0.01, 0.9, 0.02]) == pytest.approx([0.06, None, 0.04, 0.9, 0.06])
  assert paired.holm([0.7, 0.6]) == [1, 1]
