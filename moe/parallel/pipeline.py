"""Runs any pipeline schedule inside a fully manual `shard_map`: a scan over ticks, each a switch over kinds of cells.

A stage is traced once, forward and backward, and cut (`cut.py`): F makes y and the sums, B what the input's gradient
needs besides, W the rest. What waits between ticks lies in rings (`rings.py`). After each tick, inputs move a stage on
and gradients a stage back, one ppermute per slot and direction. Nothing here knows a schedule's name.

Gradients are added, and rings written, outside of the switch: XLA copies what a branch changes, and updates in place
what a loop carries.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from moe.ops.varying import vary, varying_axes
from moe.parallel.cut import AXIS, Part, cut
from moe.parallel.rings import RINGS, Plan, plan
from moe.parallel.schedule import Schedule


class Found(NamedTuple):
  """What all microbatches and this rank's stages add up to.

  shared, layers: float32 gradients of the arguments of `run`; `shared` is this rank's part, to be summed over 'pipe'.
  sums: of this rank's stages, to be summed over 'pipe' too.
  """

  shared: Any
  layers: list
  sums: Any


class _Stage(NamedTuple):
  """A traced stage. parts, outs: of F, B, W. constants: operands past the arguments. like: a row of each ring."""

  parts: dict[str, Part]
  outs: dict[str, Any]
  constants: list
  like: dict[str, Any]
  sums: Any


def run(
  schedule: Schedule,
  forward: Callable,
  shared: Any,
  layers: Sequence[Any],
  microbatches: Any,
  x_like: jax.Array,
  keep: bool = True,
) -> Found:
  """Gradients of the sum of all stages' losses over all microbatches; inside `shard_map`.

  Args:
    schedule: valid, for as many ranks as 'pipe' has.
    forward: (shared, a slot's layers), x, microbatch, stage -> ((y, this stage's part of the loss), sums); stage is an
      int32 that differs between ranks. The first stage ignores x, and the last one's y is ignored.
    shared: weights that every stage holds.
    layers: weights of this rank's stages, one tree per slot.
    microbatches: a tree of [M, ...].
    x_like: zeros of x's type.
    keep: keep what the backward pass needs from the forward one; otherwise the stage's input, and B runs F again.

  Raises:
    ValueError: there is a collective over 'pipe' in a stage (see `cut.cut`).
  """
  axes = varying_axes(x_like) | {AXIS}
  shared, layers, microbatches, x_like = vary((shared, list(layers), microbatches, x_like), (AXIS,))
  stage_of = jnp.array(
    [[schedule.stage_of(rank, slot) for slot in range(len(layers))] for rank in range(schedule.ranks)], jnp.int32
  )[lax.axis_index(AXIS)]
  one = vary(jnp.ones(()), axes)
  example = (shared, layers[0]), x_like, _pick(microbatches, 0), stage_of[0], x_like, one
  stage, follow = _trace(forward, example, keep), plan(schedule)
  rings = {ring: _zeros(stage.like[ring], (follow.rows[ring] + 1,)) for ring in RINGS}
  totals = _zeros(shared, (), jnp.float32), _zeros(layers[0], (len(layers),), jnp.float32)
  sums = jax.tree.map(lambda a: vary(jnp.zeros(a.shape, a.dtype), axes), stage.sums)
  branches = [_branch(cell, stage, shared, layers, microbatches, stage_of, one) for cell in follow.kinds]

  def tick(carry, rows):
    (total_shared, total_layers), sums, rings = carry
    row = _pick(rows, lax.axis_index(AXIS))
    (d_shared, d_layers), sums, made = lax.switch(row['kind'], branches, sums, rings, row)
    slot = row['weight_slot']
    total_layers = _put(total_layers, _add(_pick(total_layers, slot), d_layers), slot)
    arrived = made | _moved(made, schedule)
    for ring in RINGS:
      for slot in range(len(layers)):
        rings = rings | {ring: _put(rings[ring], arrived[ring][slot], row['write'][ring][slot])}
    return ((_add(total_shared, d_shared), total_layers), sums, rings), None

  (totals, sums, _), _ = lax.scan(tick, (totals, sums, rings), _rows(follow))
  return Found(totals[0], [_pick(totals[1], slot) for slot in range(len(layers))], sums)


def _trace(forward: Callable, example: tuple, keep: bool) -> _Stage:
  """The stage, cut. Without `keep` nothing of F is taken by B and W, which run it again."""

  def whole(w, x, microbatch, stage, dy, one):
    (y, _), pull, sums = jax.vjp(lambda w, x: forward(w, x, microbatch, stage), w, x, has_aux=True)
    dw, dx = pull((dy, one))
    return (y, sums), dx, dw

  program, shapes = jax.make_jaxpr(whole, return_shape=True)(*example)
  outs = dict(zip('FBW', map(jax.tree.structure, shapes), strict=True))
  counts = [len(jax.tree.leaves(one)) for one in shapes]
  ends = itertools.accumulate(counts)
  F, B, W = (list(range(end - count, end)) for end, count in zip(ends, counts, strict=True))
  if keep:
    parts = dict(zip('FBW', cut(program, [F, B, W]), strict=True))
  else:
    parts = dict(zip('FBW', [cut(program, [F])[0], *cut(program, [B, W])], strict=True))
  x_like = example[1]
  like = {'x': x_like, 'dy': x_like}
  like |= {ring: [v.aval for v in parts[kind].keeps] for ring, kind in (('kept', 'F'), ('crossed', 'B'))}
  return _Stage(parts, outs, program.consts, like, shapes[0][1])


def _branch(cell, stage: _Stage, shared, layers, microbatches, stage_of, one) -> Callable:
  """(sums, rings, this rank's row of the plan) -> dw, sums, and a row for each ring and slot, of one kind of cell."""

  def run_cell(sums, rings, row):
    dw = _zeros((shared, layers[0]))
    made = {ring: [_zeros(stage.like[ring]) for _ in layers] for ring in RINGS}
    of_cell: dict[int, dict[core.Var, jax.Array]] = {}
    for i, (kind, slot, which) in enumerate(cell):
      mine = of_cell.setdefault(which, {})
      for ring, earlier in (('kept', 'F'), ('crossed', 'B'))[: 'FBW'.index(kind)]:
        if (earlier, slot, which) not in cell:
          mine |= dict(zip(stage.parts[earlier].keeps, _pick(rings[ring], row['read'][ring][i]), strict=True))
      x, dy = (_pick(rings[ring], row['read'][ring][i]) for ring in ('x', 'dy'))
      dy = jnp.where(row['is_last'][i], 0, dy)
      operands = (shared, layers[slot]), x, _pick(microbatches, row['microbatch'][i]), stage_of[slot], dy, one
      outs, new = stage.parts[kind].run([*jax.tree.leaves(operands), *stage.constants], mine)
      outs = stage.outs[kind].unflatten(outs)
      mine |= new
      waiting = vary(list(new.values()), (AXIS,))  # a value that is alike on all ranks is not so in a ring
      if kind == 'F':
        made['x'][slot], made['kept'][slot] = outs[0], waiting
        sums = jax.tree.map(jnp.add, sums, outs[1])
      elif kind == 'B':
        made['dy'][slot], made['crossed'][slot] = outs, waiting
      else:
        dw = outs
    return dw, sums, made

  return run_cell


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
