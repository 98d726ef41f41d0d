"""Differences between variants that were run with the same seeds, or partly the same, and how sure they are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
TINY = 1e-9  # singular values below are rounding


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


class Adjusted(NamedTuple):
  """A variant's mean as if it had been run with every seed, and how far it is above the base's.

  `gap` is None where no chain of variants and seeds joins the variant to the base; `error`, its standard error, there,
  and where no run is left to tell the noise by.
  """

  mean: float
  gap: float | None
  error: float | None


def adjusted(base: str, variants: Sequence[str], seeds: Sequence[int], values: Sequence[float]) -> dict[str, Adjusted]:
  """Means adjusted for seeds: least squares of value = variant + seed + noise over all runs, an entry each.

  The batches of a seed are good or bad for all variants, so that plain means over other seeds cannot be compared. Where
  all variants have the same seeds, the adjusted means are the plain ones. The noise is taken to be as large in all.

  Args:
    base: the variant that gaps are to.
    variants, seeds, values: of each run.
  """
  names = list(dict.fromkeys(variants))
  value = np.array(values, np.float64)
  one_hot = lambda own: np.equal.outer(own, list(dict.fromkeys(own))).astype(float)
  of_variant, of_seed = one_hot(variants), one_hot(seeds)
  to_means = (of_variant / of_variant.sum(0)).T
  within = of_seed - of_variant @ to_means @ of_seed
  to_effects = np.linalg.pinv(within, rcond=TINY)
  to_adjusted = to_means - to_means @ of_seed @ to_effects
  mean = to_adjusted @ value
  noise = value - of_variant @ mean - of_seed @ (to_effects @ value)
  freedom = len(value) - len(names) - np.linalg.matrix_rank(within, tol=TINY)
  std = float(noise @ noise / freedom) ** 0.5 if freedom else None
  found = {}
  for i, name in enumerate(names):
    gap = error = None
    if base in names:
      to_gap = to_adjusted[i] - to_adjusted[names.index(base)]
      if np.allclose(to_gap @ of_seed, 0):  # what is common to the runs of a seed cancels
        gap = float(to_gap @ value)
        error = None if std is None else std * float(np.linalg.norm(to_gap))
    found[name] = Adjusted(float(mean[i]), gap, error)
  return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Holm's correction for testing several variants against one base; None stays None."""
  order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  adjusted, largest = list(p_values), 0.0
  for rank, (p, i) in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * p))
    adjusted[i] = largest
  return adjusted
