"""Results folders of sweeps that nobody ran: losses and loads from formulas."""

import dataclasses
import json
import math

import numpy as np

from moe.config import BalanceConfig, Config, ModelConfig, TrainConfig
from moe.sweep import manifest
from moe.sweep.variants import named

STEPS, BATCH_TOKENS, VAL_TOKENS = 40, 512, 4096
FLOPS_PER_TOKEN = 2e6
# variant: (settings, loss above the first's, logarithmic skew of the loads)
VARIANTS = {
  'sign': ({'balance.bias_rule': 'sign'}, 0.0, 0.05),
  'none': ({'balance.bias_rule': 'none'}, -0.01, 1.2),
  'switch_0.001': (
    {'balance.bias_rule': 'none', 'balance.aux_loss': 'switch', 'balance.aux_alpha': 0.001},
    0.01,
    0.6,
  ),
  'switch_0.01': ({'balance.bias_rule': 'none', 'balance.aux_loss': 'switch', 'balance.aux_alpha': 0.01}, 0.04, 0.2),
}


def config() -> Config:
  model = ModelConfig(d_model=32, d_expert=16, num_layers=3, num_experts=16, top_k=4, mtp_depth=0)
  train = TrainConfig(steps=STEPS, batch_size=8)
  return Config(model=model, balance=BalanceConfig(), train=train)


def make(path, seeds=(0, 1, 2), variants=VARIANTS) -> manifest.Sweep:
  """Writes sweep.json and every run, finished."""
  declared = named({name: settings for name, (settings, _, _) in variants.items()})
  sweep = manifest.open_folder(path, manifest.make('fake', 'small', config(), declared, seeds))
  for run in sweep.runs:
    write_run(path / run.folder, run, *variants[run.variant][1:])
  return sweep


def write_run(path, run, gap, skew, steps=STEPS):
  """A run of `steps` steps; finished if those are all."""
  path.mkdir()
  rng = np.random.default_rng(run.seed)  # the same noise in every variant, as from the same batches
  direction_LE = rng.normal(size=(2, 16))
  noise = rng.normal(size=STEPS) * 0.02
  own = 0.001 * np.random.default_rng(list(run.variant.encode())).normal(size=3)[run.seed % 3]
  info = {'config': dataclasses.asdict(run.config), 'versions': {'jax': '0.0'}, 'command': 'train', 'device': '1 x CPU'}
  (path / 'config.json').write_text(json.dumps(info))
  data = {'digest': 'abc', 'corpus': 'text', 'train_bytes': 1000, 'train_tokens': 1000, 'val_bytes': 100}
  (path / 'data.json').write_text(json.dumps(data))
  rows, history = [], []
  for step in range(1, steps + 1):
    share = min(1, (step - 1) / 10)  # all variants begin alike
    loss = 2 + 3 * math.exp(-step / 8) + share * (gap + own) + noise[step - 1]
    load_LE = loads(direction_LE * (1.5 * (1 - share) + share * skew), BATCH_TOKENS * 4)
    vio = float((load_LE.max(1) / load_LE.mean(1) - 1).mean())
    speed = {'tokens_per_s': 1e4, 'step_s': 0.05, 'model_tflop_per_s': 1e4 * FLOPS_PER_TOKEN / 1e12}
    rows.append(
      {'step': step, 'loss': loss, 'tokens': step * BATCH_TOKENS, 'max_vio_batch': vio, 'drop_rate': 0.0} | speed
    )
    history.append({'step': step, 'load_LE': load_LE.tolist()})
  write_jsonl(path / 'metrics.jsonl', rows)
  write_jsonl(path / 'load_history.jsonl', history)
  if steps == STEPS:
    nats = 2.1 + gap + own + noise.mean()
    row = {'step': steps, 'val_loss': nats, 'val_perplexity': math.exp(nats), 'val_bits_per_byte': nats / math.log(2)}
    load_LE = loads(direction_LE * skew, VAL_TOKENS * 4)
    write_jsonl(path / 'evals.jsonl', [row | {'val_tokens': VAL_TOKENS, 'load_LE': load_LE.tolist()}])
    (path / 'summary.json').write_text(json.dumps({'finished': True}))


def loads(logits_LE, assignments):
  share_LE = np.exp(logits_LE) / np.exp(logits_LE).sum(1, keepdims=True)
  load_LE = np.floor(share_LE * assignments).astype(int)
  load_LE[:, 0] += assignments - load_LE.sum(1)
  return load_LE


def write_jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
