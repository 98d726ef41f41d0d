"""Training runs of a second or two: their settings, in a command line and in process, and what they leave behind."""

import pathlib
import subprocess
import sys

import numpy as np
from processes import environment

from moe.balance import load_history
from moe.balance.load_history import LoadHistory
from moe.config import Config, from_config_dict, to_config_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {
  'model.d_model': 32,
  'model.num_layers': 2,
  'model.d_ff': 64,
  'model.d_expert': 32,
  'model.num_experts': 8,
  'model.top_k': 2,
  'model.kv_lora_rank': 16,
  'model.qk_nope_dim': 8,
  'model.qk_rope_dim': 8,
  'model.v_dim': 8,
  'model.mtp_depth': 0,
  'data.seq_len': 32,
  'data.val_fraction': 0.1,
  'train.steps': 12,
  'train.batch_size': 16,
  'train.eval_every': 4,
  'train.eval_sequences': 16,
  'train.sample_tokens': 0,
  'optimizer.warmup_steps': 2,
  'checkpoint.every_steps': 4,
  'precision.matmul': 'highest',
}
SAMPLED = {'train.sample_tokens': 3}


def write_corpus(folder):
  """Twenty files of random words of Python; returns the folder."""
  rng = np.random.default_rng(0)
  for name in range(20):
    words = rng.choice(['def ', 'return ', 'x', 'y', ' = ', '(', ')', '\n', 'import '], 400)
    (folder / f'{name:02}.py').write_text(''.join(words))
  return folder


def flags(corpus, **changes):
  return [f'--config.{key}={value}' for key, value in (SMALL | {'data.paths': corpus} | changes).items()]


def config(corpus, **changes) -> Config:
  settings = to_config_dict(Config())
  for key, value in (SMALL | {'data.paths': str(corpus)} | changes).items():
    section, name = key.split('.')
    settings[section][name] = value
  return from_config_dict(settings)


def command(workdir, arguments):
  return [sys.executable, 'experiments/train.py', '--config=configs/default.py', f'--workdir={workdir}', *arguments]


def run(workdir, arguments):
  return subprocess.run(
    command(workdir, arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
  )


def loads(workdir):
  return [row['load_LE'] for row in LoadHistory(pathlib.Path(workdir) / load_history.FILE, (1, 8))]
