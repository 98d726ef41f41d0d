"""Whether what the caller of the standalone layer gives has the shape and kind that it needs; one line for what not."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe.errors import UserError

KINDS = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}


def shape_of_x(x_BSD, d_model: int) -> tuple[int, int, int]:
  """Raises UserError unless x is real numbers, [B, S, D], and there are some."""
  shape = getattr(x_BSD, 'shape', None)
  if shape is None or len(shape) != 3 or shape[-1] != d_model or 0 in shape:
    what = f'an array of shape {shape}' if shape is not None else type(x_BSD).__name__
    raise UserError(f'x_BSD must be an array [B, S, {d_model}] with B and S at least 1, not {what}')
  if any(jnp.issubdtype(x_BSD.dtype, kind) for kind in (jnp.complexfloating, jnp.bool_)):
    raise UserError(f'x_BSD must be real numbers, not {x_BSD.dtype}')
  return shape


def check(name: str, array, shape: tuple[int, ...], kind: type) -> None:
  """Raises UserError unless it is an array of this shape and kind.

  Args:
    name: what to call it.
    array: to be checked.
    shape: that it must have.
    kind: bool, int or float.
  """
  found = getattr(array, 'shape', None)
  if found is None or tuple(found) != shape or not jnp.issubdtype(array.dtype, KINDS[kind]):
    what = f'{array.dtype} {list(found)}' if found is not None else type(array).__name__
    raise UserError(f'{name} must be {kind.__name__} {list(shape)}, not {what}')


def check_tree(name: str, tree, like: Mapping, source: str) -> None:
  """Raises UserError unless the tree has the leaves of `like`, each of its shape and of float numbers.

  Args:
    name: what to call it.
    tree: nested dict of arrays.
    like: nested dict of shapes.
    source: the function that makes such trees.
  """
  dotted = lambda tree: {'.'.join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
  if not isinstance(tree, Mapping):
    raise UserError(f'{name} must be the dict that {source} makes, not {type(tree).__name__}')
  found, due = dotted(tree), dotted(like)
  if found.keys() != due.keys():
    off = sorted(found.keys() ^ due.keys())
    raise UserError(f'{name} must have {", ".join(due)}, as {source} makes them; missing or unknown: {", ".join(off)}')
  for key, leaf in due.items():
    check(f'{name}: {key}', found[key], tuple(leaf.shape), float)
