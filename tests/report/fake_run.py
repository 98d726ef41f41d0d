"""A run directory as training leaves it, of made-up numbers: its loss and imbalance decay."""

import json
import math

import numpy as np

BATCH_TOKENS, VAL_TOKENS = 4096, 20000


def write_run(path, num_layers=5, num_experts=16, top_k=4, steps=300, history_every=10, drops=False):
  """A run whose loss and imbalance decay; returns its path."""
  path.mkdir(parents=True)
  rng = np.random.default_rng(0)
  config = {
    'model': {'num_layers': num_layers, 'num_dense_layers': 1, 'mtp_depth': 1, 'top_k': top_k},
    'balance': {'bias_rule': 'sign', 'gamma': 0.001, 'aux_loss': 'none'},
    'train': {'steps': steps, 'seed': 7},
    'mesh': {'preset': 'local', 'pipe': 0, 'data': 0, 'expert': 2, 'tensor': 0},
  }
  config['model']['num_experts'] = num_experts
  info = {'config': config, 'versions': {'jax': '0.0'}, 'command': 'python train.py --config <x>', 'device': '1 x CPU'}
  write_json(path / 'config.json', info | {'parameters': 1234567, 'active_parameters': 234567})
  data = {'digest': 'abc', 'corpus': 'Python <stdlib>', 'tokenizer': 'byte', 'train_bytes': 9000000, 'val_bytes': 20000}
  data |= {'train_tokens': 9000900, 'val_tokens': 20010, 'trigram_bits_per_byte': 2.9, 'gzip_bits_per_byte': 2.2}
  write_json(path / 'data.json', data)
  rows = [metrics_row(step, steps, rng, drops) for step in range(1, steps + 1)]
  write_jsonl(path / 'metrics.jsonl', rows)
  skew_LE = rng.normal(size=(num_layers, num_experts))
  logged = [1, *range(history_every, steps + 1, history_every)]
  history = [{'step': step, 'load_LE': load(skew_LE, step, BATCH_TOKENS * top_k, rng)} for step in logged]
  write_jsonl(path / 'load_history.jsonl', history)
  evals = [evaluation(step, skew_LE, top_k, rng) for step in (steps // 3, 2 * steps // 3, steps)]
  write_jsonl(path / 'evals.jsonl', evals)
  (path / 'sample.txt').write_text('def f(x):\n  return x\n<script>alert("x")</script>\n')
  return path


def metrics_row(step, steps, rng, drops):
  loss = 1.2 + 4.3 * math.exp(-step / 60) + 0.05 * rng.normal()
  rate = 0.1 * math.exp(-step / 100) if drops else 0.0
  return {
    'step': step,
    'loss': loss,
    'total_loss': loss + 0.5,
    'tokens': step * BATCH_TOKENS,
    'tokens_per_s': 900.0 if step == 1 else 41000 + 800 * rng.normal(),
    'step_s': 4.5 if step == 1 else 0.1,
    'learning_rate': 1e-3 * min(step / 50, 1, (steps + 1 - step) / (0.2 * steps)),
    'grad_norm': 0.4 + 2 * math.exp(-step / 30) + 0.1 * rng.random(),
    'grad_norm/router': 0.1,
    'max_vio_batch': 1.5 * math.exp(-step / 70) + 0.06,
    'drop_rate': rate,
    'bias_min': -0.001 * min(step, 80),
    'bias_max': 0.001 * min(step, 60),
    'gate_entropy': 0.95 - 0.3 * step / steps,
  }


def load(skew_LE, step, assignments, rng):
  logits = skew_LE * 0.8 * math.exp(-step / 70)
  p_LE = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  return rng.multinomial(assignments, p_LE).tolist()


def evaluation(step, skew_LE, top_k, rng):
  nats = 1.25 + 4.3 * math.exp(-step / 60)
  row = {'step': step, 'val_loss': nats, 'val_bits_per_byte': nats / math.log(2), 'val_perplexity': math.exp(nats)}
  return row | {'val_tokens': VAL_TOKENS, 'load_LE': load(skew_LE, step, VAL_TOKENS * top_k, rng)}


def write_json(path, value):
  path.write_text(json.dumps(value))


def write_jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def read_jsonl(path):
  return [json.loads(line) for line in path.read_text().splitlines()]
