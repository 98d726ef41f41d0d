"""Pipeline schedules as tables, in pure Python: table[tick][rank] is the cell of operations that a rank runs in a tick.

A rank holds one or two slots, each a stage of the model, and a microbatch visits (rank, slot) pairs in the order of its
path. F runs a stage forward, B makes the gradient of its input, W that of its weights. What an operation needs was made
in an earlier tick, or earlier in its cell; a cell has at most one F, one B and one W.

    gpipe       all forwards, then all backwards (arXiv 1811.06965)
    1f1b        a forward, then a backward, in turn (arXiv 1806.03377)
    zb_h1       1f1b whose weight gradients wait, to fill what would be bubbles (arXiv 2401.10241)
    dualpipe    half of the microbatches go up the ranks, half down: each rank holds two stages (arXiv 2412.19437)
    dualpipe_v  all go up the ranks and down again, through twice as many stages of half the size (its repository)

A table is laid out from programs, what each rank does in order. In the textbooks' form ranks run freely. One program
for all ranks exchanges after each tick instead, so neighbours wait for each other: packed tables give a rank as many
cells per tick as fit beside the longest one there, which costs rows held and no time in the steady state.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe import validation
from moe.errors import UserError


class Op(NamedTuple):
  """kind: 'F', 'B' or 'W'. slot: which of its rank's stages. microbatch: from 0."""

  kind: str
  slot: int
  microbatch: int


Cell = tuple[Op, ...]
Path = tuple[tuple[int, int], ...]  # (rank, slot) of each stage, in order


@dataclasses.dataclass(frozen=True)
class Times:
  """How long operations take, in any unit. overlapped: an F beside a whole backward of another one; 0: the sum."""

  forward: float = 1.0
  input_grad: float = 1.0
  weight_grad: float = 1.0
  overlapped: float = 0.0

  def of(self, cell: Cell) -> float:
    """Of all operations of a cell."""
    one = {'F': self.forward, 'B': self.input_grad, 'W': self.weight_grad}
    total = sum(one[op.kind] for op in cell)
    return total - sum(one.values()) + self.overlapped if self.overlapped and overlaps(cell) else total


def overlaps(cell: Cell) -> bool:
  """Whether a cell begins with a forward and goes on with a whole backward: exchanges of one hide behind the other."""
  return len(cell) > 2 and cell[0].kind == 'F' and {'B', 'W'} <= {op.kind for op in cell[1:]}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A table, and the path of each microbatch."""

  name: str
  paths: tuple[Path, ...]
  table: tuple[tuple[Cell, ...], ...]

  @property
  def ranks(self) -> int:
    return len(self.table[0])

  @property
  def stages(self) -> int:
    """That a microbatch goes through."""
    return len(self.paths[0])

  def stage_of(self, rank: int, slot: int) -> int:
    """Which stage a rank holds in a slot."""
    return next(path.index((rank, slot)) for path in self.paths if (rank, slot) in path)


def needs(op: Op, rank: int, paths: Sequence[Path]) -> list[tuple[int, Op]]:
  """(rank, operation) pairs that must come before `op` on `rank`."""
  path = paths[op.microbatch]
  if op.kind == 'W':
    return [(rank, op._replace(kind='B'))]
  found = [] if op.kind == 'F' else [(rank, op._replace(kind='F'))]
  before = path.index((rank, op.slot)) + (-1 if op.kind == 'F' else 1)
  if 0 <= before < len(path):
    at, slot = path[before]
    found.append((at, op._replace(slot=slot)))
  return found


def make(name: str, ranks: int, microbatches: int, times: Times | None = None) -> Schedule:
  """A schedule.

  Args:
    name: of SCHEDULES.
    ranks: of the pipeline.
    microbatches: per step.
    times: pack the table for ranks that wait for each other after each tick, by these durations, whose ratios matter;
      None: the textbooks' cells. A wrong guess costs time, never correctness.

  Raises:
    UserError: an unknown name, or numbers that the schedule cannot have.
  """
  check(name)
  if ranks < 2 or microbatches < 1:
    raise UserError(f'a pipeline needs at least 2 ranks and 1 microbatch, not {ranks} and {microbatches}')
  paths, programs = SCHEDULES[name](ranks, microbatches, times is not None)
  return _lay_out(name, paths, programs, times)


def check(name: str) -> None:
  """Raises UserError if there is no schedule of this name."""
  if name not in SCHEDULES:
    raise UserError(f'pipeline schedule {name!r} must be one of {", ".join(SCHEDULES)}')


# ------------------------------------------------------------------------------------------------------------ programs

Programs = tuple[tuple[Path, ...], list[list[Cell]]]  # paths, and each rank's cells in order


def _up(ranks: int) -> Path:
  return tuple((rank, 0) for rank in range(ranks))


def _down(ranks: int) -> Path:
  return tuple((rank, 1) for rank in reversed(range(ranks)))


def _forward(microbatch: int) -> Cell:
  return (Op('F', 0, microbatch),)


def _backward(microbatch: int) -> Cell:
  return Op('B', 0, microbatch), Op('W', 0, microbatch)


def _gpipe(ranks: int, microbatches: int, packed: bool) -> Programs:
  del packed  # nothing to gain: all ranks do the same at a time
  cells = [_forward(i) for i in range(microbatches)] + [_backward(i) for i in range(microbatches)]
  return (_up(ranks),) * microbatches, [cells] * ranks


def _one_f_one_b(ranks: int, microbatches: int, packed: bool) -> Programs:
  """Packed, a cell is a forward and a backward, and twice as many forwards come before the first backward."""

  def program(rank):
    warmup = min((2 if packed else 1) * (ranks - 1 - rank), microbatches)
    cells = [_forward(i) for i in range(warmup)]
    for i in range(microbatches):
      forward = _forward(warmup + i) if warmup + i < microbatches else ()
      cells += [forward + _backward(i)] if packed else [cell for cell in (forward, _backward(i)) if cell]
    return cells

  return (_up(ranks),) * microbatches, [program(rank) for rank in range(ranks)]


def _zb_h1(ranks: int, microbatches: int, packed: bool) -> Programs:
  """Rank r puts weight gradients off by r microbatches, so that none holds more microbatches than there are ranks."""
  del packed

  def program(rank):
    warmup, done = min(ranks - 1 - rank, microbatches), 0
    cells = [_forward(i) for i in range(warmup)]
    for i in range(microbatches):
      if warmup + i < microbatches:
        cells.append(_forward(warmup + i))
      cells.append((Op('B', 0, i),))
      if i >= rank or warmup + i >= microbatches - 1:
        cells.append((Op('W', 0, done),))
        done += 1
    return cells + [(Op('W', 0, i),) for i in range(done, microbatches)]

  return (_up(ranks),) * microbatches, [program(rank) for rank in range(ranks)]


def _dualpipe(ranks: int, microbatches: int, packed: bool) -> Programs:
  del packed
  if ranks % 2:
    raise UserError(f"'dualpipe' pairs ranks from both ends, so their number must be even, not {ranks}; use dualpipe_v")
  if ranks == 2:
    raise UserError("'dualpipe' on 2 ranks would hold all layers on each, as data parallelism does; use dualpipe_v")
  if microbatches % 2:
    raise UserError(f"'dualpipe' sends half of the microbatches each way, so their number must be even: {microbatches}")
  half = microbatches // 2
  first_of = ((0, 0), (1, half)), ((1, half), (0, 0))  # (slot, first microbatch), the way that starts nearer first
  programs = [
    _eight_steps(ranks // 2, min(rank, ranks - 1 - rank), first_of[rank >= ranks // 2], half) for rank in range(ranks)
  ]
  return (_up(ranks),) * half + (_down(ranks),) * half, programs


def _dualpipe_v(ranks: int, microbatches: int, packed: bool) -> Programs:
  del packed
  programs = [_eight_steps(ranks, rank, ((0, 0), (1, 0)), microbatches) for rank in range(ranks)]
  return (_up(ranks) + _down(ranks),) * microbatches, programs


class _Phases:
  """Cells of a rank of DualPipe, counting the microbatches of its two ways, and the weight gradients that wait.

  A way's microbatches beyond the last have no operations: with few microbatches, cells are left out.
  """

  def __init__(self, first_of, per_way: int):
    self.cells: list[Cell] = []
    self.waiting: list[Op] = []
    self._ways, self._count = first_of, per_way
    self._done = {(kind, way): 0 for way in range(len(first_of)) for kind in 'FB'}

  def _next(self, kind, way) -> Cell:
    (slot, first), number = self._ways[way], self._done[kind, way]
    self._done[kind, way] += 1
    return (Op(kind, slot, first + number),) if number < self._count else ()

  def forward(self, way: int) -> Cell:
    return self._next('F', way)

  def backward(self, way: int) -> Cell:
    return tuple(op._replace(kind=kind) for op in self._next('B', way) for kind in 'BW')

  def input_gradient(self, way: int) -> Cell:
    """Its weight gradient waits."""
    cell = self._next('B', way)
    self.waiting += [op._replace(kind='W') for op in cell]
    return cell

  def weight_gradient(self) -> Cell:
    return (self.waiting.pop(0),) if self.waiting else ()


def _eight_steps(half: int, near: int, first_of, per_way: int) -> list[Cell]:
  """The steps of DualPipe's repository for one rank.

  Args:
    half: ranks from an end to the middle (DualPipe), or all ranks (DualPipeV, folded there).
    near: this rank's distance from its end.
    first_of: (slot, first microbatch) of the way that starts at this end, then of the other.
    per_way: microbatches of a way. The steps are those of 2 * half of them or more.
  """
  one, far = _Phases(first_of, per_way), half - near - 1
  one.cells += [one.forward(0) for _ in range(2 * far)]  # 1
  for _ in range(near + 1):  # 2
    one.cells += [one.forward(0), one.forward(1)]
  for _ in range(far):  # 3
    one.cells += [one.input_gradient(1), one.weight_gradient(), one.forward(1)]
  for i in range(max(per_way, 2 * half) - 2 * half + near + 1):  # 4
    first_in_the_middle = i == 0 and near == half - 1  # apart, so that the neighbour need not wait for both
    forward, backward = one.forward(0), one.backward(1)
    one.cells += [forward, backward] if first_in_the_middle else [forward + backward]
    one.cells.append(one.forward(1) + one.backward(0))
  for _ in range(far):  # 5
    one.cells += [one.backward(1), one.forward(1) + one.backward(0)]
  for i in range(2 * (near + 1)):  # 6
    one.cells.append(one.input_gradient(1 - i % 2) if i > near else one.backward(1 - i % 2))
  for _ in range(far):  # 7
    one.cells += [one.weight_gradient(), one.input_gradient(0)]
  return [cell for cell in one.cells if cell] + [(op,) for op in one.waiting]  # 8


SCHEDULES: dict[str, Callable[[int, int, bool], Programs]] = dict(
  zip(validation.SCHEDULES, (_gpipe, _one_f_one_b, _zb_h1, _dualpipe, _dualpipe_v), strict=True)
)


# -------------------------------------------------------------------------------------------------------------- layout


def _lay_out(name: str, paths: tuple[Path, ...], programs: list[list[Cell]], times: Times | None) -> Schedule:
  """The programs on common ticks, each cell as early as what it needs allows."""
  done: set[tuple[int, Op]] = set()
  left = [list(reversed(program)) for program in programs]
  table: list[tuple[Cell, ...]] = []
  while any(left):
    row = [_take(rank, (), cells, done, paths) for rank, cells in enumerate(left)]
    if not any(row):
      raise ValueError(f'{name}: no rank can go on after tick {len(table)}')
    if times is not None:
      longest = max(map(times.of, row))
      row = [_fill(rank, cell, left[rank], done, paths, times, longest) for rank, cell in enumerate(row)]
    done.update((rank, op) for rank, cell in enumerate(row) for op in cell)
    table.append(tuple(row))
  return Schedule(name, paths, tuple(table))


def _take(rank: int, before: Cell, cells: list[Cell], done: set, paths) -> Cell:
  """Takes a rank's next cell from the end of `cells`, if all it needs is there; else ()."""
  if not cells:
    return ()
  whole = before + cells[-1]
  kinds = [op.kind for op in whole]
  ready = lambda i, need: need in done or (need[0] == rank and need[1] in whole[:i])
  if len(set(kinds)) < len(kinds) or not all(
    ready(i, need) for i, op in enumerate(whole) for need in needs(op, rank, paths)
  ):
    return ()
  return cells.pop()


def _fill(rank: int, cell: Cell, cells: list[Cell], done: set, paths, times: Times, longest: float) -> Cell:
  """A cell and those after it, as long as they fit into a tick of another rank's length."""
  while cell and cells and times.of(cell) + times.of(cells[-1]) <= longest + 1e-9:
    more = _take(rank, cell, cells, done, paths)
    if not more:
      break
    cell += more
  return cell
