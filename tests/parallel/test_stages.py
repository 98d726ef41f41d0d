"""Which layers a stage has: no division leaves the busiest rank less to do, and every layer is somewhere."""

import itertools

import numpy as np
import pytest
from test_configs import load

from moe.errors import UserError
from moe.model import flops
from moe.parallel.schedule import SCHEDULES, make
from moe.parallel.stages import Stages, divide, together

SCHEDULE_OF = {name: make(name, 4, 8) for name in SCHEDULES} | {'2 ranks': make('dualpipe_v', 2, 4)}


def busiest(counts, ranks, first, last):
  work = [count + first * (i == 0) + last * (i == len(counts) - 1) for i, count in enumerate(counts)]
  return max(sum(work[stage] for stage in rank) for rank in ranks)


@pytest.mark.parametrize('name', ['1f1b', 'dualpipe', '2 ranks'])
@pytest.mark.parametrize(('first', 'last'), [(0, 0), (1, 2.8), (2.5, 0.5), (0, 7)])
def test_no_division_is_better(name, first, last):
  ranks = together(SCHEDULE_OF[name])
  for layers in range(2, 9):
    found = divide(layers, ranks, first, last)
    assert sum(found) == layers
    assert all(found[1:-1])
    every = (counts for counts in itertools.product(range(layers + 1), repeat=4) if sum(counts) == layers)
    best = min(busiest(counts, ranks, first, last) for counts in every if all(counts[1:-1]))
    assert busiest(found, ranks, first, last) == pytest.approx(best)


def test_v3_on_16_ranks():
  """What is first and last counts: a last stage that has enough to do without gets no MoE layer."""
  ranks = [(stage,) for stage in range(16)]
  assert divide(58, ranks, 3, 4.4) == [2, *[4] * 14, 0]
  work = flops.stage_work(load('deepseek_v3'))
  assert work.first == pytest.approx(3, abs=0.05)
  assert work.last == pytest.approx(3.9, abs=0.05)
  assert divide(58, ranks, work.first, work.last) == [1, *[4] * 14, 1]


@pytest.mark.parametrize('name', SCHEDULE_OF)
def test_each_stage_has_the_layers_after_those_of_the_stage_before(name):
  schedule = SCHEDULE_OF[name]
  stages = Stages.of(schedule, 9, first=1.5)
  for path in schedule.paths:
    rows = np.concatenate([stages.rows[at] for at in path])
    np.testing.assert_array_equal(rows[rows >= 0], range(9))
    np.testing.assert_array_equal([stages.stage_of[at] for at in path], range(len(path)))
    for at in path:
      np.testing.assert_array_equal(stages.rows_of_stage[stages.stage_of[at]], stages.rows[at])


def test_what_cannot_be():
  with pytest.raises(UserError, match='8 stages of a pipeline need at least 6 MoE layers, and the model has 5'):
    divide(5, [(stage,) for stage in range(8)])
