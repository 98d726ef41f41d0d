"""Differences between variants that were run with the same seeds, and how sure they are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Difference(NamedTuple):
  """Mean of (other - base) over seeds; its 95% interval and p-value of the paired t-test, None below two seeds."""

  seeds: int
  mean: float
  low: float | None
  high: float | None
  p: float | None


def difference(base: Sequence[float], other: Sequence[float]) -> Difference | None:
  """`other` against `base`, a value per common seed in the same order; None without any.

  With differences that are all equal, the interval has no width and p is 0, or 1 if they are all 0.
  """
  delta = np.subtract(other, base, dtype=np.float64)
  n = len(delta)
  if n == 0:
    return None
  mean = float(delta.mean())
  if n == 1:
    return Difference(n, mean, None, None, None)
  error = float(delta.std(ddof=1)) / n**0.5
  if error == 0:
    return Difference(n, mean, mean, mean, float(mean == 0))
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
  return Difference(n, mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Holm's correction for testing several variants against one base; None stays None."""
  order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  adjusted, largest = list(p_values), 0.0
  for rank, (p, i) in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * p))
    adjusted[i] = largest
  return adjusted
