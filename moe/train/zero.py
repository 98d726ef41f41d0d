"""ZeRO-1 (arXiv 1910.02054): weights come together from stored shards once a step, and gradients go back to them.

Both are one function and its transpose, inside `shard_map`. In a pipeline a rank gets the layers of its stages only, by
an all-to-all over `pipe`: what it needs of layers, in the order in which it needs it, from every rank's part of each.
That a schedule has layers twice (`dualpipe`), folded (`dualpipe_v`) or in stages of unequal size is in the order alone,
so masters and checkpoints are laid out alike for all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe.model.parameters import is_float32
from moe.ops.varying import vary
from moe.parallel.sharding import Placement


def gather(params, placements, compute: str, rows_RN: np.ndarray | None = None):
  """Stored shards -> the weights this device computes with, cast before they travel.

  Args:
    params: nested dict of this device's float32 shards.
    placements: a like tree of `Placement`.
    compute: dtype of the weights; routers and norms stay float32.
    rows_RN: int32, which layers each of the R ranks of a pipeline gets, in order; stacked parameters come as [N, ...].
      None: there is no pipeline.
  """
  cast = lambda path, w: w if is_float32(path[-1].key) else w.astype(compute)
  return _gather(jax.tree.map_with_path(cast, params), placements, rows_RN)


def reduce(grads, params, placements, rows_RN: np.ndarray | None = None):
  """Gradients as the weights of `gather` are laid out -> their sums over the mesh, as `params` are, in float32.

  Args:
    grads: like the weights.
    params: as of `gather`, for their shapes.
    placements, rows_RN: as of `gather`.
  """
  grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
  found = jax.linear_transpose(lambda params: _gather(params, placements, rows_RN), params)(grads)
  return found[0]


def _gather(params, placements, rows_RN):
  in_pipeline = rows_RN is not None
  one = functools.partial(_weight, rows_RN=rows_RN) if in_pipeline else _over_batch_axes
  return jax.tree.map(one, placements, params, is_leaf=lambda node: isinstance(node, Placement))


def _over_batch_axes(placed, w):
  if placed.zero_dim is None:
    return vary(w, placed.zero_axes)
  return lax.all_gather(w, placed.zero_axes, axis=placed.zero_dim, tiled=True)


def _weight(placed, w, rows_RN):
  if not placed.stacked:
    w = vary(w, ('pipe',)) if placed.pipe_dim is None else lax.all_gather(w, 'pipe', axis=placed.pipe_dim, tiled=True)
  elif placed.pipe_dim is None:
    w = vary(w, ('pipe',))[jnp.asarray(rows_RN)[lax.axis_index('pipe')]]
  else:
    w = lax.all_to_all(w[rows_RN], 'pipe', split_axis=0, concat_axis=placed.pipe_dim + 1, tiled=True)[0]
  return _over_batch_axes(placed, w)
