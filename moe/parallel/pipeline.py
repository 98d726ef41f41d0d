"""Runs any pipeline schedule inside a fully manual `shard_map`: a scan over ticks, each a switch over kinds of cells.

A stage is traced once, forward and backward, and cut (`traced.py`, `cut.py`): F makes y and the sums, B what the
gradient of the input needs besides, W the rest. A weight's gradient that comes out of one equation with the input's, as
from a loop over layers, is B's too. What waits between ticks lies in rings (`rings.py`). After each tick, inputs move a
stage on and gradients a stage back, one ppermute per slot and direction. Nothing here knows a schedule's name.

Gradients are added, and rings written, outside of the switch: XLA copies what a branch changes, and updates in place
what a loop carries.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from moe.ops.varying import vary, varying_axes
from moe.parallel.cut import AXIS
from moe.parallel.rings import TRAVEL, Plan, plan
from moe.parallel.schedule import Schedule
from moe.parallel.traced import KEPT_BY, Traced, trace


class Found(NamedTuple):
  """What all microbatches and this rank's stages add up to.

  shared, layers: float32 gradients of the arguments of `run`; `shared` is this rank's part, to be summed over 'pipe'.
  sums: of this rank's stages, to be summed over 'pipe' too.
  """

  shared: Any
  layers: list
  sums: Any


class _Weights(NamedTuple):
  """What a rank computes with: weights of all stages, of its slots, and what is prepared of them by slot and role."""

  shared: Any
  layers: list
  prepared: list[list[dict]]


class _Grads(NamedTuple):
  """Gradients of weights, as leaves: of `shared`, and of layers by which part makes them: W, or B, which is earlier.

  What a cell has found is of its W's and its B's slot. Totals of layers have [slots, ...].
  """

  shared: list
  late: list
  early: list


def run(
  schedule: Schedule,
  forwards: Sequence[Callable],
  roles: Sequence[Sequence[int]],
  shared: Any,
  layers: Sequence[Any],
  microbatches: Any,
  x_like: jax.Array,
) -> Found:
  """Gradients of the sum of all stages' losses over all microbatches; inside `shard_map`.

  Args:
    schedule: valid, for as many ranks as 'pipe' has.
    forwards: by role: (shared, a slot's layers), x, microbatch, stage -> ((y, this stage's part of the loss), sums);
      stage is an int32 that differs between ranks. What the first stage does with x, and the last one's y, is ignored.
    roles: of each rank's slots.
    shared: weights that every stage holds.
    layers: weights of this rank's stages, one tree per slot.
    microbatches: a tree of [M, ...].
    x_like: zeros of x's type.

  Raises:
    ValueError: there is a collective over 'pipe' in a stage (see `cut.cut`).
  """
  axes, slots = varying_axes(x_like) | {AXIS}, range(len(layers))
  shared, layers, microbatches, x_like = vary((shared, list(layers), microbatches, x_like), (AXIS,))
  stage_of = jnp.array([[schedule.stage_of(rank, slot) for slot in slots] for rank in range(schedule.ranks)], jnp.int32)
  stage_of = stage_of[lax.axis_index(AXIS)]
  one = vary(jnp.ones(()), axes)
  example = (shared, layers[0]), x_like, _pick(microbatches, 0), stage_of[0], x_like, one
  traced, follow = trace(forwards, example), plan(schedule, roles)
  rows = {'x': x_like, 'dy': x_like} | {ring: row for ring, row in traced.rows.items() if follow.rows[ring]}
  rings = {ring: _zeros(row, (follow.rows[ring] + 1,)) for ring, row in rows.items()}
  operands = lambda slot, x, microbatch, dy: ((shared, layers[slot]), x, microbatch, stage_of[slot], dy, one)
  of_slot = lambda slot: [stage.run('P', operands(slot, x_like, example[2], x_like), {})[1] for stage in traced.stages]
  weights = _Weights(shared, list(layers), [of_slot(slot) for slot in slots])
  totals = _no_grads(traced, weights, (len(layers),), jnp.float32)
  sums = jax.tree.map(lambda a: vary(jnp.zeros(a.shape, a.dtype), axes), traced.sums)
  branches = [_branch(cell, traced, weights, rows, microbatches, operands) for cell in follow.kinds]

  def tick(carry, of_ranks):
    totals, sums, rings = carry
    row = _pick(of_ranks, lax.axis_index(AXIS))
    found, sums, made = lax.switch(row['kind'], branches, sums, rings, row)
    late, early = (
      _put(total, _add(_pick(total, row['slot'][kind]), new), row['slot'][kind])
      for kind, total, new in (('W', totals.late, found.late), ('B', totals.early, found.early))
    )
    totals = _Grads(_add(totals.shared, found.shared), late, early)
    made |= _moved(made, schedule)
    for ring in rows:
      for values, at in zip(made[ring], row['write'][ring], strict=True):
        rings = rings | {ring: _put(rings[ring], values, at)}
    return (totals, sums, rings), None

  (totals, sums, _), _ = lax.scan(tick, (totals, sums, rings), _rows(follow))
  return Found(*_trees(totals, traced, weights), sums)


def _branch(cell, traced: Traced, weights: _Weights, rows, microbatches, operands: Callable) -> Callable:
  """(sums, rings, this rank's row of the plan) -> gradients, sums, and what goes into rings, of one kind of cell.

  Args:
    cell: the kind.
    traced, weights, microbatches: of the pipeline.
    rows: ring -> types of a row, of rings in which anything waits.
    operands: (slot, x, microbatch, dy) -> those of a stage's parts.
  """

  def run_cell(sums, rings, row):
    found = _no_grads(traced, weights)
    made = {ring: [_zeros(row)] * (len(weights.layers) if ring in TRAVEL else 1) for ring, row in rows.items()}
    of_cell: dict[int, dict[core.Var, jax.Array]] = {}
    for i, (kind, slot, which, role) in enumerate(cell):
      stage = traced.stages[role]
      mine = of_cell.setdefault(which, dict(weights.prepared[slot][role]))
      for ring, earlier in list(KEPT_BY.items())[: 'FBW'.index(kind)]:
        if (earlier, slot, which, role) not in cell:
          mine |= stage.of_row(ring, _pick(rings[ring], row['read'][ring][i]))
      x, dy = (_pick(rings[ring], row['read'][ring][i]) for ring in ('x', 'dy'))
      dy = jnp.where(row['is_last'][i], 0, dy)
      outs, new = stage.run(kind, operands(slot, x, _pick(microbatches, row['microbatch'][i]), dy), mine)
      mine |= new
      for ring in KEPT_BY:
        if KEPT_BY[ring] == kind and ring in rows:
          made[ring] = [stage.row(ring, new, made[ring][0])]
      if kind == 'F':
        made['x'][slot], more = traced.outs.unflatten(outs)
        sums = jax.tree.map(jnp.add, sums, more)
      elif kind == 'B':
        made['dy'][slot], *early = outs
        found.early[:] = _take(found, traced, early, True)
      else:
        found.late[:] = _take(found, traced, outs, False)
    return found, sums, made

  return run_cell


def _take(found: _Grads, traced: Traced, grads: list, early: bool) -> list:
  """Adds gradients that a part has made to those of `shared`; the others, which are of layers."""
  shared = [i for i, is_early in enumerate(traced.early[: len(found.shared)]) if is_early == early]
  for i, grad in zip(shared, grads, strict=False):
    found.shared[i] = found.shared[i] + grad
  return grads[len(shared) :]


def _no_grads(traced: Traced, weights: _Weights, rows: tuple[int, ...] = (), dtype=None) -> _Grads:
  """Zeros for what a cell finds, or for totals; `rows` and `dtype` are those of totals."""
  shared = jax.tree.leaves(weights.shared)
  of_layers = list(zip(jax.tree.leaves(weights.layers[0]), traced.early[len(shared) :], strict=True))
  late, early = ([w for w, is_early in of_layers if is_early == which] for which in (False, True))
  return _Grads(_zeros(shared, (), dtype), _zeros(late, rows, dtype), _zeros(early, rows, dtype))


def _trees(totals: _Grads, traced: Traced, weights: _Weights) -> tuple[Any, list]:
  """Gradients as the weights are laid out: of `shared`, and of each slot's layers."""
  early, found = traced.early[len(totals.shared) :], []
  for slot, like in enumerate(weights.layers):
    left = {False: iter(_pick(totals.late, slot)), True: iter(_pick(totals.early, slot))}
    found.append(jax.tree.unflatten(jax.tree.structure(like), [next(left[is_early]) for is_early in early]))
  return jax.tree.unflatten(jax.tree.structure(weights.shared), totals.shared), found


def _moved(made: dict, schedule: Schedule) -> dict:
  """Inputs of the next stages and gradients of those before, as they arrive: one ppermute per slot and direction."""
  on = [(rank, rank + 1) for rank in range(schedule.ranks - 1)]
  back = [(there, here) for here, there in on]
  x = [lax.ppermute(a, AXIS, (on, back)[slot]) for slot, a in enumerate(made['x'])]
  dy = [lax.ppermute(a, AXIS, (back, on)[slot]) for slot, a in enumerate(made['dy'])]
  last = schedule.ranks - 1
  if (last, 0) in schedule.paths[0][:-1] and (last, 1) in schedule.paths[0]:  # the path turns there, and nothing moves
    turns = lax.axis_index(AXIS) == last
    x[1] = jnp.where(turns, made['x'][0], x[1])
    dy[0] = jnp.where(turns, made['dy'][1], dy[0])
  return {'x': x, 'dy': dy}


def _rows(follow: Plan) -> dict:
  """The plan's arrays, ticks first, for the scan."""
  named = {name: value for name, value in follow._asdict().items() if name not in ('kinds', 'rows')}
  return jax.tree.map(jnp.asarray, named)


def _zeros(like, rows: tuple[int, ...] = (), dtype=None):
  """Zeros of the arrays' or types' shapes, `rows` in front, that vary as they do, and over 'pipe'."""

  def zeros(a):
    of = a if hasattr(a, 'manual_axis_type') else jax.typeof(a)  # a type already, or an array
    return vary(jnp.zeros((*rows, *a.shape), dtype or a.dtype), of.manual_axis_type.varying | {AXIS})

  return jax.tree.map(zeros, like)


def _pick(tree, row):
  return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, row, 0, keepdims=False), tree)


def _put(tree, values, row):
  return jax.tree.map(lambda a, value: lax.dynamic_update_index_in_dim(a, value, row, 0), tree, values)


def _add(totals, values):
  return jax.tree.map(lambda total, value: total + value.astype(total.dtype), totals, values)
