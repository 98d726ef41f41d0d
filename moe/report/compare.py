"""Two runs over the same data, step by step: how far their training losses are apart."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from moe.errors import UserError
from moe.report.figures import BLUE, GREY, ORANGE, curve, save
from moe.report.run import Run


def compare(base: Run, other: Run, last: int) -> dict[str, float | int]:
  """Relative differences of the loss, (other - base) / base, over the `last` steps that both runs have.

  Returns:
    'steps' in common, 'last', 'mean_difference' (signed), 'mean_absolute_difference', and both mean losses there.

  Raises:
    UserError: the runs differ in text or seed, or have less than `last` steps in common.
  """
  for what, mine, theirs in (
    ('text', base.data.get('digest'), other.data.get('digest')),
    ('train.seed', base.setting('train.seed'), other.setting('train.seed')),
  ):
    if mine != theirs:
      raise UserError(f'{base.path} and {other.path} differ in {what} ({mine}, {theirs}): their steps do not compare')
  steps, losses, others = common(base, other)
  if not 0 < last <= len(steps):
    common_steps = f'{base.path} and {other.path} have {len(steps)} steps in common'
    raise UserError(f'--last = {last}: {common_steps}' + (f'; choose 1 to {len(steps)}' if len(steps) else ''))
  difference = (others / losses - 1)[-last:]
  return {
    'steps': len(steps),
    'last': last,
    'mean_difference': float(difference.mean()),
    'mean_absolute_difference': float(np.abs(difference).mean()),
    'loss': float(losses[-last:].mean()),
    'other_loss': float(others[-last:].mean()),
  }


def common(base: Run, other: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(steps that both logged, loss of `base` there, loss of `other` there)."""
  (steps, losses), (other_steps, other_losses) = base.series('loss'), other.series('loss')
  both, at, other_at = np.intersect1d(steps, other_steps, return_indices=True)
  return both, losses[at], other_losses[other_at]


def plot(base: Run, other: Run, names: tuple[str, str], path: pathlib.Path) -> None:
  """Writes a picture: both losses in nats per token, and their relative difference below.

  Args:
    base, other: the runs; differences are relative to the first.
    names: what they are called in the legend, in this order.
    path: of the file, whose suffix says which kind it is.
  """
  steps, losses, others = common(base, other)
  figure = Figure(figsize=(7, 5), layout='constrained')
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  for name, values, color in zip(names, (losses, others), (BLUE, ORANGE), strict=True):
    curve(above, steps, values, color, name)
  above.set_ylabel('loss, nats per token')
  above.legend(frameon=False)
  curve(below, steps, 100 * (others / losses - 1), ORANGE)
  below.axhline(0, color=GREY, linewidth=1)
  limit = 1.2 * np.quantile(np.abs(100 * (others / losses - 1)), 0.98) or 1
  below.set_ylim(-limit, limit)
  below.set_ylabel('difference, %')
  below.set_xlabel('step')
  for axes in (above, below):
    axes.spines[['top', 'right']].set_visible(False)
  save(figure, path)
