"""From packed rows on every host to global batches on the mesh."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe.data.batches import Batches, Rows
from moe.step import BATCH_SPEC


def train_batch(batches: Batches, step: int, microbatches: int, mesh) -> dict[str, jax.Array]:
  """The global batch of `step` (from 0): [microbatches, B, S + 1]; each process reads only its own rows."""
  size = batches.batch_size // microbatches

  def rows(micro, lo, hi):
    return batches.rows(step, micro * size + lo, micro * size + hi)

  return _place(rows, (microbatches, size), mesh)


def eval_batch(rows: Rows, index: int, size: int, limit: int, mesh) -> dict[str, jax.Array]:
  """Validation batch `index`: rows index * size onwards, padding from row `limit` on; [1, size, S + 1]."""
  first = index * size

  def part(_, lo, hi):
    batch = rows.padded_rows(first + lo, first + hi)
    past = np.arange(first + lo, first + hi) >= limit
    batch['segment_BS'][past] = 0
    return batch

  return _place(part, (1, size), mesh)


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

  return {
    key: jax.make_array_from_callback((*shape, width), sharding, lambda index, key=key: read(index, key))
    for key in ('token_BS', 'segment_BS')
  }
