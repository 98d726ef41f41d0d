"""Where a pipeline's values wait between ticks: a schedule as int32 arrays that one compiled loop can follow.

What one operation makes and a later one needs waits in a ring, a buffer of rows on each rank, from the tick that makes
it to the last tick that reads it:

    x        a stage's input: from the tick in which the stage before made it, to this stage's W
    dy       the gradient of its output: from the tick of the stage after, to this stage's W
    kept     what F made for B and W
    crossed  what B made for W

A row is free again after its last reader, so a ring has as many rows as its fullest rank needs at once. Slots of a rank
share a ring. In a tick, all reads come before all writes. Pure numpy.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.parallel.schedule import Cell, Op, Schedule

TRAVEL = ('x', 'dy')  # to other ranks
RINGS = (*TRAVEL, 'kept', 'crossed')
Held = tuple[int, int, int]  # rank, slot, microbatch


class Plan(NamedTuple):
  """A schedule for a loop over ticks. Arrays are int32; `rows[ring]` is also the row that nobody reads, for scrap.

  kinds: cells that occur, as `kind_of` says: one is compiled for each.
  rows: ring -> its length.
  kind: [tick, rank], index into kinds.
  microbatch: [tick, rank, operation of the cell]; 0 past its end.
  is_last: whether the operation is of the last stage, whose dy is 0; shape as microbatch.
  slot: 'B' and 'W' -> [tick, rank], the slot of the cell's operation of that kind; 0 if it has none.
  read: ring -> row that an operation reads, shape as microbatch.
  write: ring -> rows that the end of a tick writes: of kept and crossed [tick, rank, 1], of x and dy, with what arrives
    from elsewhere, [tick, rank, slot].
  """

  kinds: tuple[tuple, ...]
  rows: dict[str, int]
  kind: np.ndarray
  microbatch: np.ndarray
  is_last: np.ndarray
  slot: dict[str, np.ndarray]
  read: dict[str, np.ndarray]
  write: dict[str, np.ndarray]


def kind_of(cell: Cell, roles: Sequence[int]) -> tuple[tuple[str, int, int, int], ...]:
  """What is compiled of a cell: (kind, slot, which of the cell's microbatches, role of the slot) of each operation."""
  pairs = list(dict.fromkeys((op.slot, op.microbatch) for op in cell))
  return tuple((op.kind, op.slot, pairs.index((op.slot, op.microbatch)), roles[op.slot]) for op in cell)


def lifetimes(schedule: Schedule) -> dict[str, dict[Held, tuple[int, int]]]:
  """ring -> (rank, slot, microbatch) -> (tick whose end writes it, last tick that reads it), where anything waits."""
  tick_of = {
    (rank, op): tick for tick, row in enumerate(schedule.table) for rank, cell in enumerate(row) for op in cell
  }
  found: dict[str, dict[Held, tuple[int, int]]] = {ring: {} for ring in RINGS}
  for microbatch, path in enumerate(schedule.paths):
    at = {kind: [tick_of[rank, Op(kind, slot, microbatch)] for rank, slot in path] for kind in 'FBW'}
    for stage, (rank, slot) in enumerate(path):
      held, F, B, W = (rank, slot, microbatch), at['F'][stage], at['B'][stage], at['W'][stage]
      if stage > 0:
        found['x'][held] = at['F'][stage - 1], W
      if stage + 1 < len(path):
        found['dy'][held] = at['B'][stage + 1], W
      if W > F:
        found['kept'][held] = F, W
      if W > B:
        found['crossed'][held] = B, W
  return found


def _rows_of(lives: dict[Held, tuple[int, int]], ranks: int) -> tuple[dict[Held, int], int]:
  """A row for each, the first that is free on its rank, and how many rows the fullest rank has."""
  row_of: dict[Held, int] = {}
  busy_until: list[list[int]] = [[] for _ in range(ranks)]  # of each row of a rank
  for held, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
    mine = busy_until[held[0]]
    row = next((row for row, until in enumerate(mine) if until <= first), len(mine))
    mine[row : row + 1] = [last]
    row_of[held] = row
  return row_of, max(map(len, busy_until))


def plan(schedule: Schedule, roles: Sequence[Sequence[int]]) -> Plan:
  """The schedule as arrays; it must be valid (`moe.parallel.simulate.validate`). `roles`: of each rank's slots."""
  rings = {ring: _rows_of(lives, schedule.ranks) for ring, lives in lifetimes(schedule).items()}
  rows = {ring: length for ring, (_, length) in rings.items()}
  kinds = tuple(sorted({kind_of(cell, roles[rank]) for row in schedule.table for rank, cell in enumerate(row)}))
  slots = 1 + max(slot for path in schedule.paths for _, slot in path)
  ticks, width = (len(schedule.table), schedule.ranks), max(map(len, kinds))
  zeros = lambda *more: np.zeros((*ticks, *more), np.int32)
  found = Plan(
    kinds, rows, zeros(), zeros(width), zeros(width), {kind: zeros() for kind in 'BW'},
    {ring: zeros(width) + rows[ring] for ring in RINGS},
    {ring: zeros(slots if ring in TRAVEL else 1) + rows[ring] for ring in RINGS},
  )  # fmt: skip
  for tick, row in enumerate(schedule.table):
    for rank, cell in enumerate(row):
      found.kind[tick, rank] = bisect.bisect_left(kinds, kind_of(cell, roles[rank]))
      for i, op in enumerate(cell):
        _place(found, schedule.paths[op.microbatch], {ring: rings[ring][0] for ring in RINGS}, (tick, rank, i), op)
  return found


def _place(found: Plan, path, row_of: dict[str, dict[Held, int]], at: tuple[int, int, int], op: Op) -> None:
  """Fills in what one operation reads, and where what it makes is written."""
  tick, rank, _ = at
  held, stage = (rank, op.slot, op.microbatch), path.index((rank, op.slot))
  found.microbatch[at], found.is_last[at] = op.microbatch, stage == len(path) - 1
  for ring in RINGS:
    found.read[ring][at] = row_of[ring].get(held, found.rows[ring])
  if op.kind in found.slot:
    found.slot[op.kind][tick, rank] = op.slot
  if op.kind == 'W':
    return
  stays, travels, to = ('kept', 'x', stage + 1) if op.kind == 'F' else ('crossed', 'dy', stage - 1)
  found.write[stays][tick, rank, 0] = row_of[stays].get(held, found.rows[stays])
  if 0 <= to < len(path):
    rank, slot = path[to]
    found.write[travels][tick, rank, slot] = row_of[travels][rank, slot, op.microbatch]
