"""Varying axes: which mesh axes an array differs over, as `jax.shard_map(check_vma=True)` tracks it in types.

Replicated and varying operands mix freely in jnp code, but not in a `custom_vjp`, a loop carry or a kernel: there all
must be cast to the same set first. Casting replicated -> varying is free, and its transpose is the psum that a
replicated value's gradient needs, so where the cast stands is where the reduction happens.
"""

import jax
from jax import lax


def varying_axes(*trees) -> frozenset[str]:
  """Union of the mesh axes that any array in `trees` varies over; empty outside shard_map."""
  return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(trees)))


def vary(tree, axes):
  """`tree` with every array cast to vary over `axes` too, besides what it already varies over."""

  def cast(leaf):
    missing = tuple(sorted(set(axes) - varying_axes(leaf)))  # sorted: the same program in every process
    return lax.pcast(leaf, missing, to='varying') if missing else leaf

  return jax.tree.map(cast, tree)


def align(*trees):
  """The arguments, all cast to vary over the union of their axes. One tuple item per argument."""
  return vary(trees, varying_axes(*trees))
