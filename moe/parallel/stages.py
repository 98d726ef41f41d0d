"""Which layers of the model a stage of a pipeline has, and which of them each rank holds. Pure Python and numpy."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.errors import UserError
from moe.parallel.schedule import Schedule


def divide(layers: int, of_ranks: Sequence[Sequence[int]], first: float = 0.0, last: float = 0.0) -> list[int]:
  """How many MoE layers each stage has, so that the rank with the most to do has as little as possible.

  Args:
    layers: MoE layers.
    of_ranks: for each rank or pair of ranks, the stages that it has; each stage in one of them.
    first, last: what the first stage does besides (embedding and dense layers) and the last (head and MTP modules), in
      MoE layers.

  Raises:
    UserError: so many stages that one between first and last would be empty.
  """
  stages = sum(map(len, of_ranks))
  if layers < stages - 2:
    raise UserError(
      f'{stages} stages of a pipeline need at least {stages - 2} MoE layers, and the model has {layers}; use a shorter '
      'pipeline, or a schedule with one stage per rank'
    )
  counts = [0] + [1] * (stages - 2) + [0]
  work = [first] + [1.0] * (stages - 2) + [last]
  for _ in range(layers - sum(counts)):
    rank = min(of_ranks, key=lambda rank: sum(work[stage] for stage in rank))
    # Of equals, the later: what earlier stages made for the backward pass waits longest.
    stage = min(rank, key=lambda stage: (work[stage], -stage))
    counts[stage] += 1
    work[stage] += 1
  return counts


def together(schedule: Schedule) -> list[tuple[int, ...]]:
  """The stages that the same ranks have, as `divide` takes them."""
  of_rank = collections.defaultdict(set)
  for path in schedule.paths:
    for stage, (rank, _) in enumerate(path):
      of_rank[rank].add(stage)
  return sorted({tuple(sorted(stages)) for stages in of_rank.values()}, reverse=True)


class Role(NamedTuple):
  """What a stage does: whether it embeds, whether it predicts, and how many MoE layers it has."""

  first: bool
  last: bool
  layers: int


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
  """A model's layers on the ranks of a pipeline.

  counts: MoE layers of each stage.
  rows: int32 [rank, slot, layer of the stage], the MoE layer there; -1 where a stage has fewer than the largest.
  stage_of: int32 [rank, slot].
  """

  counts: tuple[int, ...]
  rows: np.ndarray
  stage_of: np.ndarray

  @classmethod
  def of(cls, schedule: Schedule, layers: int, first: float = 0.0, last: float = 0.0) -> 'Stages':
    """Divides a model's MoE layers.

    Args:
      schedule: says which stages a rank has.
      layers, first, last: as of `divide`.

    Raises:
      UserError: as `divide`.
    """
    counts = divide(layers, together(schedule), first, last)
    starts = np.concatenate([[0], np.cumsum(counts)])
    slots = 1 + max(slot for path in schedule.paths for _, slot in path)
    stage_of = [[schedule.stage_of(rank, slot) for slot in range(slots)] for rank in range(schedule.ranks)]
    rows = np.full((schedule.ranks, slots, max(counts)), -1, np.int32)
    for at in np.ndindex(schedule.ranks, slots):
      stage = stage_of[at[0]][at[1]]
      rows[at][: counts[stage]] = range(starts[stage], starts[stage + 1])
    return cls(tuple(counts), rows, np.array(stage_of, np.int32))

  @property
  def rows_of_stage(self) -> np.ndarray:
    """int32 [stage, layer of the stage], as in `rows`."""
    found = np.zeros((len(self.counts), self.rows.shape[-1]), np.int32)
    found[self.stage_of] = self.rows
    return found

  def role(self, stage: int) -> Role:
    return Role(stage == 0, stage == len(self.counts) - 1, self.counts[stage])
