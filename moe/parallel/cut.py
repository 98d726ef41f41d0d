"""A traced program cut into parts by its outputs, to run at different times.

A pipeline's stage is traced once, forward and backward together. The forward part is what y needs, the input-gradient
part what dx needs besides, the weight-gradient part the rest: nothing is computed twice, whatever is inside (kernels
with gradients of their own, collectives, branches). What crosses a cut is found, not declared. What comes of weights
alone, such as two matrices side by side or in FP8, is a part before all others, which runs once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
from jax.extend import core

AXIS = 'pipe'
# Not worth keeping, nor waiting for: made again wherever it is needed.
LIGHT = {'add_any', 'convert_element_type', 'pcast', 'pvary', 'reshape', 'squeeze', 'transpose', 'broadcast_in_dim'}


class Part(NamedTuple):
  """A part of a program.

  jaxpr: of the operands `inputs`, then `takes`; it gives the part's outputs, then `keeps`.
  inputs: positions among the whole program's operands, constants last.
  takes, keeps: values made by parts before, and for parts after it.
  """

  jaxpr: core.Jaxpr
  inputs: tuple[int, ...]
  takes: tuple[core.Var, ...]
  keeps: tuple[core.Var, ...]

  def run(self, operands: Sequence[jax.Array], made: dict[core.Var, jax.Array]) -> tuple[list, dict]:
    """(the part's outputs, what it keeps by variable), from the whole program's operands and what parts before kept."""
    values = [operands[i] for i in self.inputs] + [made[variable] for variable in self.takes]
    outs = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, ()))(*values)
    count = len(outs) - len(self.keeps)
    return outs[:count], dict(zip(self.keeps, outs[count:], strict=True))


def cut(program: core.ClosedJaxpr, groups: Sequence[Sequence[int]], fixed: Sequence[int] = ()) -> list[Part]:
  """A part for what comes of the operands `fixed` alone, then one for each group of outputs with all it needs besides.

  Args:
    program: traced inside `shard_map`.
    groups: positions of outputs, each in one group.
    fixed: positions of operands that stay the same while parts run again and again.

  Raises:
    ValueError: there is a collective over AXIS in the program. Ranks run different parts at a time, so it would wait
      for ranks that never come. Autodiff adds one for weights that do not vary over AXIS: make them vary first.
  """
  if names := sorted({equation.primitive.name for equation in equations(program.jaxpr) if _is_over(equation, AXIS)}):
    raise ValueError(f'a stage has collectives over {AXIS!r}: {", ".join(names)}; let what it differentiates vary')
  whole = program.jaxpr
  outs: list[list] = [[], *([whole.outvars[i] for i in group] for group in groups)]
  chosen = _choose(whole, outs, [whole.invars[i] for i in fixed])
  reads = [_distinct([*(v for e in part for v in e.invars), *out]) for part, out in zip(chosen, outs, strict=True)]
  makes = [{variable for equation in part for variable in equation.outvars} for part in chosen]
  place = {variable: i for i, variable in enumerate([*whole.invars, *whole.constvars])}
  parts = []
  for n, part in enumerate(chosen):
    inputs = [variable for variable in reads[n] if variable in place]
    takes = [variable for variable in reads[n] if variable not in place and variable not in makes[n]]
    later = [variable for m in range(n + 1, len(chosen)) for variable in reads[m] if variable not in makes[m]]
    keeps = [variable for variable in dict.fromkeys(later) if variable in makes[n]]
    ins, given = inputs + takes, outs[n] + keeps
    about = whole.debug_info._replace(arg_names=('',) * len(ins), result_paths=('',) * len(given))
    jaxpr = core.Jaxpr((), ins, given, part, debug_info=about)
    parts.append(Part(jaxpr, tuple(place[variable] for variable in inputs), tuple(takes), tuple(keeps)))
  return parts


def is_light(part: Part, out: int) -> bool:
  """Whether the part does next to nothing for its output `out`: parts before have made it, all but for a cast or so.

  So it is with what comes out of one equation, such as a loop or a branch, beside what an earlier part must have.
  """
  wanted = set(_distinct([part.jaxpr.outvars[out]]))
  for equation in reversed(part.jaxpr.eqns):
    if wanted.intersection(equation.outvars):
      if equation.primitive.name not in LIGHT:
        return False
      wanted.update(_distinct(equation.invars))
  return True


def equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
  """All equations, those inside of others too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in programs(equation):
      yield from equations(inner)


def programs(equation) -> Iterator[core.Jaxpr]:
  """The programs inside of an equation: of a loop its body, of a branch each of its branches."""
  for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
    if _is_program(value):
      yield value.jaxpr if isinstance(value, core.ClosedJaxpr) else value


def _is_program(value) -> TypeGuard[core.Jaxpr | core.ClosedJaxpr]:
  return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _is_over(equation, axis: str) -> bool:
  """Whether ranks of the axis wait for each other there. Casts of types and the rank's own number do not wait."""
  if equation.primitive.name in ('pvary', 'pcast', 'axis_index'):
    return False
  named = [equation.params.get(key) for key in ('axes', 'axis_name')]
  return axis in jax.tree.leaves(named)


def _choose(whole: core.Jaxpr, outs: Sequence[Sequence], fixed: Sequence[core.Var]) -> list[list]:
  """The equations of each part, in order.

  What is alike on all ranks (constants) is made again instead of kept, and so is what is light: of `fixed` alone, or of
  one value that is no larger, such as x in float32.
  """
  of_fixed, again, wanted_first = set(fixed), set(), []
  for equation in whole.eqns:
    reads = _distinct(equation.invars)
    if not any(AXIS in _varies(out) for out in equation.outvars):
      again.add(id(equation))
    elif all(v in of_fixed or AXIS not in _varies(v) for v in reads) and not equation.effects:
      of_fixed.update(equation.outvars)
      if equation.primitive.name in LIGHT or _size(equation.outvars) > _size(reads):
        again.add(id(equation))
      else:
        wanted_first += equation.outvars
    elif equation.primitive.name in LIGHT and len(reads) == 1 and _size(reads) <= _size(equation.outvars):
      again.add(id(equation))
  taken: set[int] = set()
  chosen = []
  needed = _needed(whole, [v for out in outs for v in _distinct(out)])
  for out in ([v for v in wanted_first if v in needed], *outs[1:]):
    wanted, part = set(_distinct(out)), []
    for equation in reversed(whole.eqns):
      if id(equation) not in taken and wanted.intersection(equation.outvars):
        part.append(equation)
        wanted.update(_distinct(equation.invars))
    part.reverse()
    taken.update(id(equation) for equation in part if id(equation) not in again)
    chosen.append(part)
  return chosen


def _needed(whole: core.Jaxpr, outs: Sequence[core.Var]) -> set[core.Var]:
  """All variables that the outputs come of."""
  needed = set(outs)
  for equation in reversed(whole.eqns):
    if needed.intersection(equation.outvars):
      needed.update(_distinct(equation.invars))
  return needed


def _size(variables: Sequence[core.Var]) -> int:
  return sum(variable.aval.size * variable.aval.dtype.itemsize for variable in variables)  # type: ignore[attr-defined]


def _varies(variable: core.Var) -> frozenset[str]:
  return variable.aval.manual_axis_type.varying  # type: ignore[attr-defined]  # jax declares avals by their base


def _distinct(atoms: Sequence) -> list[core.Var]:
  """The variables among operands, literals left out, each once."""
  return list(dict.fromkeys(atom for atom in atoms if isinstance(atom, core.Var)))
