"""A pipeline's stages as programs cut into F, B and W: traced once for each role that a stage can have.

Roles differ in what is computed (the first stage embeds, the last one predicts), not in what goes in and out, so ranks
with different ones run in one program. What they keep differs, so a ring's row has a place for each value that any role
keeps, and roles share places of one type.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from moe.ops.varying import vary
from moe.parallel.cut import AXIS, Part, cut, is_light

KEPT_BY = {'kept': 'F', 'crossed': 'B'}  # ring -> the part that fills it


class Stage(NamedTuple):
  """The stages of one role.

  parts: of F, B, W, and P, which prepares weights for them. constants: operands past the arguments. places: ring ->
  where in a row each value lies that the part keeps.
  """

  parts: dict[str, Part]
  constants: list
  places: dict[str, list[int]]

  def run(self, kind: str, operands: tuple, made: dict) -> tuple[list, dict]:
    """(outputs, what is kept) of a part; `operands` as in `trace`, `made` of parts before."""
    return self.parts[kind].run([*jax.tree.leaves(operands), *self.constants], made)

  def row(self, ring: str, made: dict, empty: Sequence[jax.Array]) -> list[jax.Array]:
    """What a part has kept, as a row of the ring; `empty` in places that are not used."""
    row = list(empty)
    for variable, place in zip(self.parts[KEPT_BY[ring]].keeps, self.places[ring], strict=True):
      row[place] = vary(made[variable], (AXIS,))  # a value that is alike on all ranks is not so in a ring
    return row

  def of_row(self, ring: str, row: Sequence[jax.Array]) -> dict[core.Var, jax.Array]:
    keeps = self.parts[KEPT_BY[ring]].keeps
    return {variable: row[place] for variable, place in zip(keeps, self.places[ring], strict=True)}


class Traced(NamedTuple):
  """All roles' stages.

  early: of each leaf of the weights, whether B makes its gradient, in all roles; else W does. outs: the structure of
  F's outputs. rows: ring -> types of a row. sums: types of what F adds up.
  """

  stages: list[Stage]
  early: tuple[bool, ...]
  outs: Any
  rows: dict[str, list]
  sums: Any


def trace(forwards: Sequence[Callable], example: tuple) -> Traced:
  """Traces the roles' `forward`, as `pipeline.run` takes it, and cuts them.

  Args:
    forwards: by role.
    example: weights, x, a microbatch, the stage's number, the gradient of its output, and 1, the gradient of its loss.

  Raises:
    ValueError: as `cut.cut`, or roles differ in what they give.
  """
  programs, shapes = zip(*(_whole(forward, example) for forward in forwards), strict=True)
  if len({str(one) for one in shapes}) > 1:
    raise ValueError(f'the roles of stages differ in what they give: {shapes}')
  F, B, W = _positions(shapes[0])
  weights, _, _, stage, _, one = _positions(example)
  cut_at = lambda program, B, W: dict(
    zip('PFBW', cut(program, [F, B, W], [*weights, *stage, *one]), strict=True)
  )  # what comes of weights, the stage's number and 1 is the same for all microbatches
  together = [cut_at(program, B, W)['W'] for program in programs]
  early = tuple(all(is_light(part, i) for part in together) for i in range(len(W)))
  of_B, of_W = ([i for i, is_early in zip(W, early, strict=True) if is_early == which] for which in (True, False))
  parts = [cut_at(program, B + of_B, of_W) for program in programs]
  rows, places = {}, {}
  for ring, kind in KEPT_BY.items():
    rows[ring], places[ring] = _shared_places([[v.aval for v in one[kind].keeps] for one in parts])
  stages = [
    Stage(one, program.consts, {ring: places[ring][role] for ring in KEPT_BY})
    for role, (one, program) in enumerate(zip(parts, programs, strict=True))
  ]
  (_, sums), *_ = shapes[0]
  return Traced(stages, early, jax.tree.structure(shapes[0][0]), rows, sums)


def _whole(forward: Callable, example: tuple):
  """The program of a stage, forward and backward: (y, sums), dx, and the weights' gradients; and their shapes."""

  def whole(w, x, microbatch, stage, dy, one):
    (y, _), pull, sums = jax.vjp(lambda w, x: forward(w, x, microbatch, stage), w, x, has_aux=True)
    dw, dx = pull((dy, one))
    return (y, sums), dx, dw

  return jax.make_jaxpr(whole, return_shape=True)(*example)


def _positions(trees: tuple) -> list[list[int]]:
  """Of each tree's leaves among all of them."""
  counts = [len(jax.tree.leaves(tree)) for tree in trees]
  return [list(range(end - count, end)) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]


def _shared_places(avals_of: Sequence[Sequence]) -> tuple[list, list[list[int]]]:
  """(types of a row, for each role where its values lie in it), given the types of what each role keeps."""
  row: list = []
  places_of: dict[tuple, list[int]] = collections.defaultdict(list)
  found = []
  for avals in avals_of:
    used: collections.Counter[tuple] = collections.Counter()
    mine = []
    for aval in avals:
      key = aval.shape, aval.dtype, aval.manual_axis_type.varying | {AXIS}
      if used[key] == len(places_of[key]):
        places_of[key].append(len(row))
        row.append(aval)
      mine.append(places_of[key][used[key]])
      used[key] += 1
    found.append(mine)
  return row, found
