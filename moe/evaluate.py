"""Evaluation over the validation rows, and a generated sample."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe import feed
from moe.balance import metrics
from moe.config import Config
from moe.data.batches import Rows
from moe.data.tokenizer import Tokenizer
from moe.mesh import BATCH_AXES
from moe.state import TrainState

TEMPERATURE = 0.8  # of the generated sample


def evaluate(eval_step, state: TrainState, rows: Rows, config: Config, mesh, sequences: int = 0) -> dict:
  """Loss and balance over the first `sequences` validation rows (0: all). Routing is dropless; the bias stays.

  Returns:
    val_loss (nats per token), val_perplexity, val_bits_per_byte, val_mtp_loss if there are MTP modules, val_tokens,
    max_vio_global (mean over routers) and load_LE.
  """
  limit = min(sequences or len(rows), len(rows))
  size = config.train.batch_size // config.train.microbatches
  total = None
  for index in range(-(-limit // size)):
    batch = feed.eval_batch(rows, index, size, limit, mesh)
    # Summed on the host in float64: a large validation set outgrows float32 and int32.
    part = jax.device_get(eval_step(state.params, state.balance['bias_LE'], batch))
    part = {key: value.astype(np.int64 if key == 'load_LE' else np.float64) for key, value in part.items()}
    total = part if total is None else {key: total[key] + part[key] for key in total}
  nats = total['nats'] / np.maximum(total['predicted'], 1)
  result = {
    'val_loss': float(nats[0]),
    'val_perplexity': math.exp(min(nats[0], 700)),
    'val_bits_per_byte': float(nats[0] / math.log(2) * rows.targets_per_byte),
    'val_tokens': int(total['predicted'][0]),
    'max_vio_global': float(metrics.max_vio(total['load_LE']).mean()),
    'load_LE': total['load_LE'].tolist(),
  }
  if config.model.mtp_depth:
    result['val_mtp_loss'] = float(nats[1:].mean())
  return result


def sample(logits_step, state: TrainState, tokenizer: Tokenizer, config: Config, mesh) -> str:
  """Continues train.sample_prompt by train.sample_tokens tokens at temperature 0.8, from the seed of the run.

  Each token costs a full forward pass over the last seq_len tokens: fine for a glimpse, not for serving.
  """
  rng = np.random.default_rng(config.train.seed)
  tokens = [tokenizer.bos_id, *tokenizer.encode(config.train.sample_prompt.encode())]
  rows, S = mesh.shape['data'] * mesh.shape['expert'], config.data.seq_len
  sharding = NamedSharding(mesh, P(BATCH_AXES))
  for _ in range(config.train.sample_tokens):
    window = tokens[-S:]
    token_BS, segment_BS = np.zeros((2, rows, S), np.int32)
    token_BS[:, : len(window)], segment_BS[:, : len(window)] = window, 1
    args = [
      jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index]) for a in (token_BS, segment_BS)
    ]
    logits_SV = logits_step(state.params, state.balance['bias_LE'], *args, jnp.int32(len(window) - 1))
    logits_V = np.asarray(logits_SV, np.float64)[: tokenizer.vocab_size] / TEMPERATURE
    logits_V[tokenizer.bos_id] = -np.inf  # a new document is not a continuation
    probs_V = np.exp(logits_V - logits_V.max())
    tokens.append(int(rng.choice(len(probs_V), p=probs_V / probs_V.sum())))
  return tokenizer.decode(tokens)
