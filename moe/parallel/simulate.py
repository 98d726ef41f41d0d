"""What a pipeline schedule costs: when each operation runs, how long ranks wait, how many microbatches they hold."""

from typing import NamedTuple

from moe.parallel.schedule import Op, Schedule, Times, needs, overlaps


class Ran(NamedTuple):
  """An operation on a rank, from `begin` to `end`, in the unit of the times."""

  rank: int
  op: Op
  begin: float
  end: float


def validate(schedule: Schedule) -> None:
  """Raises ValueError unless each F, B and W of each microbatch and stage runs once, and after what it needs."""
  tick_of: dict[tuple[int, Op], int] = {}
  for tick, row in enumerate(schedule.table):
    for rank, cell in enumerate(row):
      for i, op in enumerate(cell):
        earlier = {(rank, one) for one in cell[:i]}
        late = [
          need for need in needs(op, rank, schedule.paths) if tick_of.get(need, tick) >= tick and need not in earlier
        ]
        if late or (rank, op) in tick_of:
          raise ValueError(f'{schedule.name}: in tick {tick} rank {rank} runs {op} again, or before {late}')
        tick_of[rank, op] = tick
  expected = 3 * sum(map(len, schedule.paths))
  if len(tick_of) != expected:
    raise ValueError(f'{schedule.name} has {len(tick_of)} operations instead of {expected}')


def timeline(schedule: Schedule, times: Times, lockstep: bool) -> list[Ran]:
  """When each operation runs.

  Args:
    schedule: a valid one.
    times: of operations. A forward and a whole backward of a cell run side by side and end together; a B and the W of
      its microbatch in one cell are one backward pass, whose results are there at its end.
    lockstep: a rank begins a tick when its neighbours have ended theirs before it, as where one program exchanges after
      each tick; otherwise when what it needs is there.
  """
  found: list[Ran] = []
  end: dict[tuple[int, Op], float] = {}
  clock = [0.0] * schedule.ranks
  for row in schedule.table:
    begin = [max(clock[max(rank - 1, 0) : rank + 2]) if lockstep else clock[rank] for rank in range(schedule.ranks)]
    for rank, cell in enumerate(row):
      arrived = lambda op, cell=cell, rank=rank: max(
        [end[need] for need in needs(op, rank, schedule.paths) if need[0] != rank or need[1] not in cell], default=0.0
      )
      at = begin[rank]
      if overlaps(cell):
        at = max([at, *map(arrived, cell)])
        spans = [(op, at, at + times.of(cell)) for op in cell]
      else:
        spans = []
        for op in cell:
          at = max(at, arrived(op))
          spans.append((op, at, at + times.of((op,))))
          at = spans[-1][2]
      whole = {op.microbatch: stop for op, _, stop in spans if op.kind == 'W'}
      for op, start, stop in spans:
        found.append(Ran(rank, op, start, stop))
        end[rank, op] = whole.get(op.microbatch, stop) if op.kind == 'B' else stop
      clock[rank] = max([clock[rank], begin[rank] if cell else clock[rank], *(stop for *_, stop in spans)])
  return found


def bubble(schedule: Schedule, times: Times, lockstep: bool) -> float:
  """The longest time that a rank waits during a step, in the unit of `times`."""
  ran = timeline(schedule, times, lockstep)
  busy = [sum(times.of(row[rank]) for row in schedule.table) for rank in range(schedule.ranks)]
  return max(one.end for one in ran) - min(busy)


def closed_form(name: str, ranks: int, times: Times) -> float:
  """The bubble that the literature gives (arXiv 2412.19437, table 2, and 2401.10241), for ranks that run freely.

  Their B is a whole backward, input_grad + weight_grad here. The unit of dualpipe_v is a stage of half the size.
  """
  F, B, W = times.forward, times.input_grad, times.weight_grad
  dual = (times.overlapped or F + B + W) + B - 2 * W
  return {
    'gpipe': (ranks - 1) * (F + B + W),
    '1f1b': (ranks - 1) * (F + B + W),
    'zb_h1': (ranks - 1) * (F + B - W),
    'dualpipe': (ranks / 2 - 1) * dual,
    'dualpipe_v': (ranks - 1) * dual,
  }[name]


def most_held(schedule: Schedule) -> list[int]:
  """Per rank, the most (microbatch, stage) pairs whose activations it keeps at once, from F to W."""
  held, most = [0] * schedule.ranks, [0] * schedule.ranks
  for row in schedule.table:
    for rank, cell in enumerate(row):
      for op in cell:
        held[rank] += {'F': 1, 'B': 0, 'W': -1}[op.kind]
        most[rank] = max(most[rank], held[rank])
  return most
