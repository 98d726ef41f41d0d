"""Pipeline schedules side by side: their bubbles, what ranks hold, and pictures of rank x time."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from moe.parallel import simulate
from moe.parallel.schedule import Schedule, Times, make

COLORS = {'F': '#1f6feb', 'B': '#d9480f', 'W': '#2b8a3e'}
NAMES = {'F': 'forward', 'B': 'gradient of inputs', 'W': 'gradient of weights'}


class Cost(NamedTuple):
  """What a schedule costs a step. Times are in units of `Times`, for stages of one size in all schedules.

  closed_form, free: bubbles by the literature and of simulated ranks that run freely. textbook, packed: of ranks that
  wait for each other after each tick, with the textbooks' cells, and with cells that fill a tick. share: of the step
  that a rank spends in the packed one. held: stages' activations that a rank keeps at once, packed.
  """

  name: str
  closed_form: float
  free: float
  textbook: float
  packed: float
  share: float
  held: float


def cost(name: str, ranks: int, microbatches: int, times: Times) -> Cost:
  """The cost of a schedule; see `moe.parallel.schedule.make` for what may be asked. Stages count as one per rank.

  Args:
    name: of `schedule.SCHEDULES`.
    ranks: of the pipeline.
    microbatches: per step.
    times: how long a stage's operations take, in any unit.

  Raises:
    UserError: as `make`.
  """
  textbook, packed = make(name, ranks, microbatches), make(name, ranks, microbatches, times)
  part = ranks / textbook.stages  # of a rank's layers that a stage has: half of them in dualpipe_v
  waits = [simulate.closed_form(name, ranks, times), simulate.bubble(textbook, times, False)]
  waits += [simulate.bubble(textbook, times, True), simulate.bubble(packed, times, True)]
  busy = max(sum(times.of(row[rank]) for row in packed.table) for rank in range(ranks)) * part
  closed_form, free, in_lockstep, packed_wait = (wait * part for wait in waits)
  held = max(simulate.most_held(packed)) * part
  share = packed_wait / (packed_wait + busy)
  return Cost(name, closed_form, free, in_lockstep, packed_wait, share, held)


def table(costs: Sequence[Cost]) -> str:
  """Rows of text under a head."""
  head = ('schedule', 'closed form', 'free', 'in lockstep', 'packed', 'of the step', 'held')
  rows = [(one.name, *(f'{wait:g}' for wait in one[1:5]), f'{100 * one.share:.1f}%', f'{one.held:g}') for one in costs]
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  line = lambda row: '  '.join(
    [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
  )
  return '\n'.join(map(line, (head, *rows)))


def picture(schedules: Sequence[Schedule], times: Times, lockstep: bool) -> Figure:
  """Rank x time of each schedule, on one time axis; numbers are microbatches, darker ones run in the second slot."""
  heights = [one.ranks for one in schedules]
  figure = Figure(figsize=(11, 0.26 * sum(heights) + 0.62 * len(heights) + 0.5), layout='constrained')
  grid = figure.subplots(len(schedules), 1, sharex=True, squeeze=False, height_ratios=heights)
  ends = [
    _draw(axes, schedule, simulate.timeline(schedule, times, lockstep), schedule.ranks / schedule.stages)
    for axes, schedule in zip(grid[:, 0], schedules, strict=True)
  ]
  grid[-1, 0].set(xlabel='time', xlim=(0, max(ends)))  # shared by all
  handles = [matplotlib.patches.Patch(color=color, label=NAMES[kind]) for kind, color in COLORS.items()]
  figure.legend(handles=handles, loc='outside upper right', ncols=3, frameon=False)
  return figure


def _draw(axes: Axes, schedule: Schedule, ran: Sequence[simulate.Ran], part: float) -> float:
  """Draws, and returns where the schedule ends. `part`: length of a unit of its time on the axis."""
  end = max(one.end for one in ran) * part
  corners, colors = [], []
  together = collections.defaultdict(list)
  for one in ran:
    together[one.rank, one.begin, one.end].append(one)
  for one in ran:
    beside = together[one.rank, one.begin, one.end]
    low = one.rank - 0.45 + 0.9 * beside.index(one) / len(beside)  # side by side: one above the other
    high = low + 0.9 / len(beside)
    left, right = one.begin * part, one.end * part
    corners.append([(left, low), (right, low), (right, high), (left, high)])
    shade = np.array(matplotlib.colors.to_rgb(COLORS[one.op.kind]))
    colors.append(shade * 0.6 if one.op.slot else shade)
    if len(beside) < 3 or one.op.kind != 'W':
      axes.text(
        (left + right) / 2, (low + high) / 2, str(one.op.microbatch), ha='center', va='center', color='white',
        fontsize=6 if len(beside) == 1 else 4,
      )  # fmt: skip
  axes.add_collection(PolyCollection(corners, facecolors=colors, edgecolors='white', linewidths=0.4))
  axes.set(ylim=(schedule.ranks - 0.4, -0.6), yticks=range(schedule.ranks))
  axes.set_yticklabels([f'rank {rank}' for rank in range(schedule.ranks)], fontsize=7)
  axes.set_title(f'{schedule.name}: {end:g}', loc='left', fontsize=9)
  axes.spines[['top', 'right']].set_visible(False)
  return end
