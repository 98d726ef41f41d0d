"""Evaluation over the validation rows."""

import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from moe.balance import metrics
from moe.config import Config
from moe.data.batches import Rows
from moe.train import feed
from moe.train.experts import Watch
from moe.train.state import TrainState, Weights

SUMS = ('nats', 'predicted', 'load_LE')


def evaluate(
  eval_step,
  state: TrainState | Weights,
  rows: Rows,
  config: Config,
  mesh,
  sequences: int = 0,
  watch: Watch | None = None,
) -> dict:
  """Loss and balance over validation rows. Routing is dropless; the bias stays.

  Args:
    eval_step: from `step.make_eval_step`, of this config and mesh.
    state: the parameters, and the bias in `balance`.
    rows: of the validation text.
    config: model, and batch and microbatches, whose quotient is the sequences at a time, or more for a large mesh.
    mesh: of the state.
    sequences: so many rows, spread over the text, so that each part of it has its weight; 0: all.
    watch: is told what became of each token.

  Returns:
    val_loss (nats per token), val_perplexity, val_bits_per_byte, val_mtp_loss if there are MTP modules, val_tokens,
    val_bytes (of the text that these tokens stand for), NAME_global for each of `metrics.METRICS` (mean over routers)
    and load_LE; and what `Watch.row` says.
  """
  chosen = rows.spread(sequences)
  size = sequences_at_a_time(config, mesh)
  total: dict[str, np.ndarray] = {}
  for batch, out in _one_behind(_results(eval_step, state, rows, chosen, size, mesh)):
    part = jax.device_get({key: out[key] for key in SUMS})
    if watch:
      expert_LBSK, nats_BS = jax.device_get((out['expert_LBSK'], out['nats_BS']))
      watch.add(batch, expert_LBSK, nats_BS, out['weight_LBSK'])
    # Summed on the host in float64: a large validation set outgrows float32 and int32.
    part = {key: value.astype(np.int64 if key == 'load_LE' else np.float64) for key, value in part.items()}
    total = part if not total else {key: total[key] + part[key] for key in total}
  nats, num_bytes = total['nats'] / np.maximum(total['predicted'], 1), rows.bytes_of(chosen)
  result = {
    'val_loss': float(nats[0]),
    'val_perplexity': math.exp(min(nats[0], 700)),
    'val_bits_per_byte': float(nats[0] / math.log(2) * (total['predicted'][0] / num_bytes)),
    'val_tokens': int(total['predicted'][0]),
    'val_bytes': num_bytes,
    **metrics.measured(total['load_LE'], 'global'),
    'load_LE': total['load_LE'].tolist(),
  }
  if config.model.mtp_depth:
    result['val_mtp_loss'] = float(nats[1:].mean())
  return result | (watch.row() if watch else {})


def sequences_at_a_time(config: Config, mesh) -> int:
  """Those of a microbatch, and as many more as give each shard of the batch equally many."""
  shards = mesh.shape['data'] * mesh.shape['expert']
  return -(-config.train.batch_size // config.train.microbatches // shards) * shards


def _results(eval_step, state, rows, chosen, size, mesh) -> Iterator[tuple[np.ndarray, dict]]:
  """(numbers of the rows, what the step gives) of each batch, as the device still works on it."""
  for first in range(0, len(chosen), size):
    some = chosen[first : first + size]
    yield some, eval_step(state.params, state.balance['bias_LE'], feed.eval_batch(rows, some, size, mesh))


def _one_behind(items: Iterable) -> Iterator:
  """The items, each once the next one is begun: the host reads a batch while the device works on the one after it."""
  before: list = []
  for item in items:
    yield from before
    before = [item]
  yield from before
