"""Rings of a pipeline: every operation reads what it needs, whoever follows the arrays alone, and no row is wasted."""

import itertools

import pytest

from moe.parallel import simulate
from moe.parallel.rings import RINGS, kind_of, lifetimes, plan
from moe.parallel.schedule import SCHEDULES, Times, make

CASES = [
  (name, *size, times)
  for name, size, times in itertools.product(SCHEDULES, [(4, 8), (4, 16), (8, 16)], [None, Times()])
]
CASES += [('gpipe', 2, 1, None), ('1f1b', 2, 3, Times()), ('dualpipe_v', 2, 5, Times()), ('zb_h1', 3, 2, None)]


def one_role(schedule):
  return [[0, 0]] * schedule.ranks


@pytest.mark.parametrize(('name', 'ranks', 'microbatches', 'times'), CASES)
def test_the_arrays_alone_carry_each_value_to_who_needs_it(name, ranks, microbatches, times):
  """A loop as the executor's, over names of values: (kind that made it, stage, microbatch)."""
  schedule = make(name, ranks, microbatches, times)
  found = plan(schedule, one_role(schedule))
  stages = schedule.stages
  rings = [{ring: [None] * (found.rows[ring] + 1) for ring in RINGS} for _ in range(ranks)]
  done = set()
  for tick in range(len(schedule.table)):
    arriving = [[] for _ in range(ranks)]
    for rank in range(ranks):
      made = {}
      for i, (kind, slot, which, _) in enumerate(found.kinds[found.kind[tick, rank]]):
        at, stage = (tick, rank, i), schedule.stage_of(rank, slot)
        microbatch = int(found.microbatch[at])
        value = lambda ring: rings[rank][ring][found.read[ring][at]]  # noqa: B023
        assert found.is_last[at] == (stage == stages - 1)
        if stage:
          assert value('x') == ('F', stage - 1, microbatch)
        if kind in 'BW' and stage < stages - 1:
          assert value('dy') == ('B', stage + 1, microbatch)
        if kind in 'BW' and ('F', which) not in made:
          assert value('kept') == ('F', stage, microbatch)
        if kind == 'W':
          assert found.slot['W'][tick, rank] == slot
          assert ('B', which) in made or value('crossed') == ('B', stage, microbatch)
        else:
          made[kind, which] = stage
          assert kind == 'F' or found.slot['B'][tick, rank] == slot
          stays, travels, to = ('kept', 'x', stage + 1) if kind == 'F' else ('crossed', 'dy', stage - 1)
          arriving[rank].append((found.write[stays][tick, rank, 0], stays, (kind, stage, microbatch)))
          if 0 <= to < stages:
            there, its_slot = schedule.paths[microbatch][to]
            arriving[there].append((found.write[travels][tick, there, its_slot], travels, (kind, stage, microbatch)))
        done.add((kind, stage, microbatch))
    for rank in range(ranks):
      for row, ring, value in arriving[rank]:
        rings[rank][ring][row] = value
  assert len(done) == 3 * stages * microbatches


@pytest.mark.parametrize(('name', 'ranks', 'microbatches', 'times'), CASES)
def test_rings_are_no_longer_than_the_table_needs(name, ranks, microbatches, times):
  schedule = make(name, ranks, microbatches, times)
  found = plan(schedule, one_role(schedule))
  for ring, lives in lifetimes(schedule).items():
    at_once = [
      sum(first < tick <= last for (rank, *_), (first, last) in lives.items() if rank == mine)
      for mine in range(ranks)
      for tick in range(len(schedule.table))
    ]
    assert found.rows[ring] == max(at_once)
  # What F keeps waits for W, so the ring has a row for each that is in flight, and one less where the fullest tick's W
  # frees it in the cell that makes the next.
  assert found.rows['kept'] in (max(simulate.most_held(schedule)), max(simulate.most_held(schedule)) - 1)


def test_what_is_compiled_does_not_grow_with_microbatches():
  for name in SCHEDULES:
    few, many = (
      len(plan(made, one_role(made)).kinds) for made in (make(name, 4, count, Times()) for count in (16, 48))
    )
    assert few == many <= 12
  schedule = make('dualpipe', 4, 8)
  assert kind_of(schedule.table[0][0], [5, 7]) == (('F', 0, 0, 5),)
  beside = kind_of(next(cell for row in schedule.table for cell in row if len(cell) == 3), [5, 7])
  assert beside == (('F', 0, 0, 5), ('B', 1, 1, 7), ('W', 1, 1, 7))  # the backward is of another microbatch
