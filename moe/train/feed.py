"""From packed rows on every host to global batches on the mesh."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe.data.batches import Batches, Rows
from moe.train.step import BATCH_SPEC


def train_batch(batches: Batches, step: int, microbatches: int, mesh) -> dict[str, jax.Array]:
  """The global batch of `step` (from 0): [microbatches, B, S + 1]; each process reads only its own rows.

  Args:
    batches: of the training text.
    step: from 0; the batch is a function of it and the seed.
    microbatches: that its sequences are divided into, B each.
    mesh: whose (data, expert) sequences are sharded over.
  """
  size = batches.batch_size // microbatches

  def rows(micro, lo, hi):
    return batches.rows(step, micro * size + lo, micro * size + hi)

  return _place(rows, (microbatches, size), mesh)


def eval_batch(rows: Rows, chosen: np.ndarray, size: int, mesh) -> dict[str, jax.Array]:
  """A validation batch: rows `chosen`, int64 [at most size], then padding; [1, size, S + 1].

  Args:
    rows: of the validation text.
    chosen: numbers of its rows.
    size: sequences of the batch, B.
    mesh: whose (data, expert) sequences are sharded over.
  """
  return _place(lambda _, lo, hi: rows.padded_rows(chosen[lo:hi], hi - lo), (1, size), mesh)


def _place(rows, shape, mesh):
  sharding = NamedSharding(mesh, BATCH_SPEC)
  width = rows(0, 0, 1)['token_BS'].shape[1]
  parts = {}

  def read(index, key):
    lo, hi, _ = index[1].indices(shape[1])
    if (lo, hi) not in parts:
      micros = [rows(micro, lo, hi) for micro in range(shape[0])]
      parts[lo, hi] = {name: np.stack([micro[name] for micro in micros]) for name in ('token_BS', 'segment_BS')}
    return parts[lo, hi][key]

  place = lambda key: jax.make_array_from_callback((*shape, width), sharding, functools.partial(read, key=key))
  return {key: place(key) for key in ('token_BS', 'segment_BS')}
