"""From a parameter's name to where it lives.

A parameter's suffix names its axes (`w_up_eDF`), and one table sends axes to mesh axes. A stacked parameter has one
axis more than its suffix, the layers `L`, in front. Masters and moments are sharded further over the batch axes
(ZeRO-1, arXiv 1910.02054): expert parameters over `data`, the others over `data` and `expert` together, on the first
free dimension that divides, never L; and in a pipeline over `pipe` as well, on that dimension if it divides, else on
another. What a rank of a pipeline computes with, the layers of its stages, comes together from there once a step
(`moe.train.zero`), whichever schedule it is.
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from moe.errors import UserError
from moe.parallel.mesh import BATCH_AXES

LEGEND = {
  'e': 'expert',
  'H': 'tensor',
  'F': 'tensor',
  'V': 'tensor',
  **dict.fromkeys('EDACNRUKGL'),
}


class Placement(NamedTuple):
  """How one parameter is laid out.

  compute: PartitionSpec of the weight as the forward pass uses it.
  stored: PartitionSpec of the fp32 master and of its moments.
  zero_axes: mesh axes its gradient is summed over; the master is sharded over them too if `zero_dim` is not None.
  zero_dim: the dimension that carries `zero_axes` in `stored`, or None when none divides.
  pipe_dim: the dimension that carries `pipe` in `stored`, or None when none divides or there is no pipeline.
  stacked: whether it has layers in front, of which a rank of a pipeline computes with some.
  """

  compute: P
  stored: P
  zero_axes: tuple[str, ...]
  zero_dim: int | None
  pipe_dim: int | None
  stacked: bool


def axes_of(name: str, ndim: int) -> str:
  """The axis letters of an array called `name`: its suffix, with L in front if it has one axis more.

  Raises:
    ValueError: the suffix has a letter outside the legend, or does not fit the number of axes.
  """
  suffix = name.rsplit('_', 1)[-1]
  if unknown := set(suffix) - set(LEGEND):
    raise ValueError(f'{name}: axis letters {sorted(unknown)} are not in the legend')
  if len(suffix) == ndim:
    return suffix
  if len(suffix) + 1 == ndim:
    return 'L' + suffix
  raise ValueError(f'{name}: {ndim} axes do not fit the suffix {suffix!r}')


def axes_over(name: str) -> tuple[str | None, ...]:
  """The mesh axis of each letter of a name's suffix; None for those that are not divided, or not in the legend."""
  return tuple(LEGEND.get(letter) for letter in name.rsplit('_', 1)[-1])


def place(name: str, shape: tuple[int, ...], mesh_sizes: dict[str, int]) -> Placement:
  """Layout of the parameter `name` of global `shape` on a mesh with axis sizes `mesh_sizes`.

  Raises:
    UserError: a sharded dimension does not divide by its mesh axis.
  """
  axes = axes_of(name, len(shape))
  compute = [LEGEND[letter] for letter in axes]
  for letter, size, axis in zip(axes, shape, compute, strict=True):
    if axis and size % mesh_sizes[axis]:
      raise UserError(f'{name}: axis {letter} of size {size} must be divisible by the {axis} axis, {mesh_sizes[axis]}')
  zero_axes = ('data',) if 'e' in axes else BATCH_AXES
  parts, pipe = math.prod(mesh_sizes[axis] for axis in zero_axes), mesh_sizes['pipe']
  free = [i for i, letter in enumerate(axes) if letter != 'L' and compute[i] is None]
  zero_dim = next((i for i in free if shape[i] % parts == 0), None)
  # `pipe` comes last in a dimension: its parts come together first.
  left = {i: shape[i] // parts if i == zero_dim else shape[i] for i in free}
  both_first = sorted(free, key=lambda i: i != zero_dim)
  pipe_dim = next((i for i in both_first if left[i] % pipe == 0), None) if pipe > 1 else None
  over = lambda i: (*(zero_axes if i == zero_dim else ()), *(('pipe',) if i == pipe_dim else ()))
  stored = [over(i) or axis for i, axis in enumerate(compute)]
  return Placement(P(*compute), P(*stored), zero_axes, zero_dim, pipe_dim, axes.startswith('L'))


def place_tree(params, mesh) -> dict:
  """A tree like `params` (nested dict of arrays or shapes) with each leaf's `Placement`."""
  sizes = dict(mesh.shape)
  return jax.tree.map_with_path(lambda path, leaf: place(path[-1].key, leaf.shape, sizes), params)


def stored(placements) -> dict:
  """The PartitionSpecs of masters, from `place_tree`."""
  return jax.tree.map(lambda placed: placed.stored, placements, is_leaf=lambda node: isinstance(node, Placement))


def is_matrix(name: str) -> bool:
  """Whether weight decay applies: two axes or more of its own, stacked layers not counted."""
  return len(name.rsplit('_', 1)[-1]) >= 2
