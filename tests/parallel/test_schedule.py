"""Pipeline schedules: every table is valid, waits as long as the literature says, and holds what it says."""

import itertools

import pytest

from moe.errors import UserError
from moe.parallel import simulate
from moe.parallel.schedule import SCHEDULES, Op, Schedule, Times, make, needs

ONE = Times()
SIZES = [(ranks, times_ranks * ranks) for ranks in (4, 8, 16) for times_ranks in (2, 4)]
FEW = [(name, 4, microbatches) for name, microbatches in itertools.product(SCHEDULES, (1, 2, 5, 9))]
EVERY = [(name, *size) for name, size in itertools.product(SCHEDULES, SIZES)]


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(('name', 'ranks', 'microbatches'), [*EVERY, *FEW])
def test_each_operation_runs_once_and_in_order(name, ranks, microbatches, packed):
  if name == 'dualpipe' and microbatches % 2:
    microbatches += 1
  schedule = make(name, ranks, microbatches, ONE if packed else None)
  simulate.validate(schedule)
  assert all(len({op.kind for op in cell}) == len(cell) for row in schedule.table for cell in row)
  # By the definition, without `needs`: microbatch by microbatch, along its path and back.
  at = {
    (rank, op): (t, i) for t, row in enumerate(schedule.table) for rank, c in enumerate(row) for i, op in enumerate(c)
  }
  for microbatch, path in enumerate(schedule.paths):
    forward = [at[rank, Op('F', slot, microbatch)] for rank, slot in path]
    backward = [at[rank, Op('B', slot, microbatch)] for rank, slot in reversed(path)]
    order = forward + backward
    of_rank = [rank for rank, _ in path] + [rank for rank, _ in reversed(path)]
    for (one, first), (other, second) in itertools.pairwise(zip(order, of_rank, strict=True)):
      assert one < other if first == second else one[0] < other[0]  # on another rank: in an earlier tick
    assert all(at[rank, Op('B', slot, microbatch)] < at[rank, Op('W', slot, microbatch)] for rank, slot in path)


@pytest.mark.parametrize(('name', 'ranks', 'microbatches'), EVERY)
def test_ranks_that_run_freely_wait_as_the_literature_says(name, ranks, microbatches):
  for times in (ONE, Times(2, 2, 2), Times(overlapped=2.5)):
    expected = simulate.closed_form(name, ranks, times)
    assert simulate.bubble(make(name, ranks, microbatches), times, lockstep=False) == pytest.approx(expected)
  uneven = Times(1, 2, 1)  # as where the forward is made again: other orders might be better
  found = simulate.bubble(make(name, ranks, microbatches), uneven, lockstep=False)
  assert found <= simulate.closed_form(name, ranks, uneven) + 1e-9


@pytest.mark.parametrize(('name', 'ranks', 'microbatches'), EVERY)
def test_packed_ticks_add_little(name, ranks, microbatches):
  """Nothing but on 8 ranks and more of DualPipe, whose phases do not fill ticks there; textbooks' cells add much."""
  free = simulate.bubble(make(name, ranks, microbatches), ONE, lockstep=False)
  packed = simulate.bubble(make(name, ranks, microbatches, ONE), ONE, lockstep=True)
  textbook = simulate.bubble(make(name, ranks, microbatches), ONE, lockstep=True)
  more = {('dualpipe', 16): 3, ('dualpipe_v', 8): 3, ('dualpipe_v', 16): 12}.get((name, ranks), 0)
  assert packed == free + more <= textbook
  if name == '1f1b':
    assert textbook > 1.5 * packed


@pytest.mark.parametrize(('name', 'ranks', 'microbatches'), EVERY)
def test_what_ranks_hold(name, ranks, microbatches):
  textbook, packed = (max(simulate.most_held(make(name, ranks, microbatches, times))) for times in (None, ONE))
  expected = {'gpipe': microbatches, '1f1b': ranks, 'zb_h1': ranks, 'dualpipe': ranks + 1, 'dualpipe_v': 2 * ranks + 1}
  assert textbook == expected[name]
  assert packed == (2 * ranks - 1 if name == '1f1b' else textbook)


def test_stages_of_slots():
  assert [make('dualpipe', 4, 8).stage_of(rank, slot) for rank in range(4) for slot in (0, 1)] == [
    0,
    3,
    1,
    2,
    2,
    1,
    3,
    0,
  ]
  schedule = make('dualpipe_v', 4, 8)
  assert [schedule.stage_of(rank, slot) for rank in range(4) for slot in (0, 1)] == [0, 7, 1, 6, 2, 5, 3, 4]
  assert (schedule.ranks, schedule.stages) == (4, 8)


def test_a_timeline_by_hand():
  """Two ranks, one microbatch: forward on both, backward on both, nothing beside anything."""
  ran = simulate.timeline(make('zb_h1', 2, 1), Times(1, 2, 4), lockstep=False)
  spans = {(one.rank, one.op.kind): (one.begin, one.end) for one in ran}
  assert spans == {
    (0, 'F'): (0, 1), (1, 'F'): (1, 2), (1, 'B'): (2, 4), (0, 'B'): (4, 6), (1, 'W'): (4, 8), (0, 'W'): (6, 10),
  }  # fmt: skip
  assert simulate.bubble(make('zb_h1', 2, 1), Times(1, 2, 4), lockstep=False) == 10 - 7


def test_damaged_tables_are_noticed():
  good = make('1f1b', 4, 8)
  late = Schedule('late', good.paths, tuple(reversed(good.table)))
  twice = Schedule('twice', good.paths, (*good.table, good.table[0]))
  short = Schedule('short', good.paths, good.table[:-1])
  for bad, says in ((late, 'or before'), (twice, 'again'), (short, '94 operations instead of 96')):
    with pytest.raises(ValueError, match=says):
      simulate.validate(bad)
  assert needs(Op('F', 0, 0), 0, good.paths) == []


@pytest.mark.parametrize(
  ('name', 'ranks', 'microbatches', 'says'),
  [
    ('zigzag', 4, 8, "'zigzag' must be one of gpipe, 1f1b, zb_h1, dualpipe, dualpipe_v"),
    ('gpipe', 1, 8, 'at least 2 ranks and 1 microbatch, not 1 and 8'),
    ('1f1b', 4, 0, 'not 4 and 0'),
    ('dualpipe', 5, 10, 'must be even, not 5; use dualpipe_v'),
    ('dualpipe', 2, 8, 'would hold all layers on each'),
    ('dualpipe', 4, 9, 'so their number must be even: 9'),
  ],
)
def test_what_cannot_be(name, ranks, microbatches, says):
  with pytest.raises(UserError, match=says):
    make(name, ranks, microbatches)
