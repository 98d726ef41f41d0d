"""Random damage to the files of a run, a sweep and an exported folder: the same numbers, or one line.

PYTHONPATH=. python tests/fuzz.py --count=300 --seed=0    # the long form of tests/test_fuzz.py; a table at the end

Each damage is one change to one file of a copy, and one thing is then done with the copy: the run is reported, is
started again or is loaded for generation, the sweep is reported, the exported folder is loaded. What that gives must
equal what the undamaged copy gives, or be a UserError of one line. Any other exception, another number, more than
LIMIT_S seconds or a gigabyte of memory more than undamaged is a fault.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from moe.commands import run as whole
from moe.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from moe.errors import UserError
from moe.inference import load
from moe.interop import to_hf
from moe.report.results import load_results
from moe.report.run import load_run, summarize
from moe.report.sweep import table_rows
from moe.sweep import manifest
from moe.sweep.variants import named
from moe.train.checkpoint import flatten

LIMIT_S, LINE = 60, 400
STEPS = 6
TIMES = ('tokens_per_s', 'step_s', 'model_tflop_per_s', 'train_s', 'mfu')
UNREAD = ('tensorboard/', 'report.html', 'table.csv', 'runs.csv')  # nothing reads them
OF_NO_REPORT = ('checkpoints/', '.owner')


def config(text: Path) -> Config:
  """A run of a second: BPE, two experts a token, a checkpoint each second step, two of them kept."""
  return Config(
    model=ModelConfig(
      vocab_size=300, d_model=16, num_layers=2, d_ff=16, d_expert=8, num_experts=8, top_k=2, num_heads=2,
      kv_lora_rank=8, qk_nope_dim=4, qk_rope_dim=4, v_dim=4, mtp_depth=0,
    ),
    data=DataConfig(
      paths=str(text), tokenizer='bpe', seq_len=16, val_fraction=0.2, cache_dir=str(text.parent / 'cache')
    ),
    train=TrainConfig(steps=STEPS, batch_size=8, eval_every=2, eval_sequences=4, sample_tokens=0),
    optimizer=OptimizerConfig(warmup_steps=2),
    checkpoint=CheckpointConfig(every_steps=2, keep=2),
  )  # fmt: skip


class Subjects:
  """A run, a sweep that holds it and its export, made once under a folder, and what is done with copies of them."""

  def __init__(self, folder: Path):
    self.folder, self.text = folder, folder / 'text'
    self.text.mkdir(parents=True)
    for i in range(12):
      (self.text / f'{i}.txt').write_text(' '.join(f'number {n * n % 997} of {i}' for n in range(60)))
    whole.train(config(self.text), str(folder / 'run'))
    self.losses = {row['step']: row['loss'] for row in load_run(folder / 'run').rows}
    to_hf.export_run(folder / 'run', folder / 'hf', 'float32')
    manifest.open_folder(folder / 'sweep', manifest.make('fuzz', 'tiny', config(self.text), named({'sign': {}}), (0,)))
    shutil.copytree(folder / 'run', folder / 'sweep' / 'sign,seed=0')
    self.actions = {
      'report': ('run', lambda run: _summary(run)),
      'load': ('run', lambda run: _loaded(run)),
      'train': ('run', self._train),
      'sweep': ('sweep', lambda sweep: table_rows(load_results(sweep))),
      'import': ('hf', lambda hf: _loaded(hf)),
    }
    self.right = {name: self._undamaged(name) for name in self.actions}

  def _undamaged(self, name):
    subject, action = self.actions[name]
    copy = shutil.copytree(self.folder / subject, self.folder / 'undamaged' / subject)
    try:
      return action(copy)
    finally:
      shutil.rmtree(self.folder / 'undamaged')

  def _train(self, run):
    """The same command again. A run that goes back to an earlier checkpoint trains on to the same end."""
    whole.train(config(self.text), str(run))
    found = load_run(run)
    state = load.load(run, MeshConfig(), 'float32')
    losses = {row['step']: row['loss'] for row in found.rows}
    expected = {step: loss for step, loss in self.losses.items() if step in losses or not found.holes}
    assert losses == expected, 'other rows, or rows are missing and nobody says so'
    return found.evals[-1]['val_loss'], _digest(state.params, state.bias_LE)

  def outcome(self, name: str, rng: np.random.Generator) -> tuple[str, str]:
    """('same' | 'refused' | 'FAULT', which file, how and what came of it) of one random damage before action `name`."""
    subject, action = self.actions[name]
    with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
      copy = shutil.copytree(self.folder / subject, Path(temporary) / subject)
      what = damage(copy, rng, UNREAD + (OF_NO_REPORT if name in ('report', 'sweep') else ()))
      try:
        with limited(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
          warnings.simplefilter('ignore')  # Orbax on what it cannot read
          found = action(copy)
      except UserError as error:
        line = str(error)
        fault = '\n' in line.strip() or len(line) > LINE
        return ('FAULT' if fault else 'refused'), f'{what}: {line}'
      except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
          raise
        return 'FAULT', f'{what}: {type(error).__name__} {str(error)[:300]}'
      return ('same', what) if found == self.right[name] else ('FAULT', f'{what}: other numbers')


def _summary(run):
  found = load_run(run)
  rows = [{key: value for key, value in row.items() if key not in TIMES} for row in found.rows]
  loads = [row['load_LE'].tolist() for row in found.load_history]
  summary = {key: value for key, value in summarize(found).items() if key not in ('run', *TIMES)}
  return json.loads(json.dumps([summary, rows, loads, found.holes]))


def _loaded(path):
  model = load.load(path, MeshConfig(), 'float32')
  tokens = model.tokenizer.encode(b'number 17 of 3').tolist()
  return [_digest(model.params, model.bias_LE), model.eos_ids, tokens, dataclasses.asdict(model.config)]


def _digest(*trees):
  leaves = [(name, np.asarray(leaf)) for tree in trees for name, leaf in sorted(flatten(tree).items())]
  return hashlib.sha256(b''.join(name.encode() + leaf.tobytes() for name, leaf in leaves)).hexdigest()


class Hangs(BaseException):
  """Not an Exception, and no TimeoutError: that is an OSError, of which much code makes a line for the user."""


@contextlib.contextmanager
def limited():
  """Hangs after LIMIT_S: nothing may."""

  def late(*_):
    raise Hangs(f'still at it after {LIMIT_S} s')

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(LIMIT_S)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------------------- damage


def damage(folder: Path, rng: np.random.Generator, but: Sequence[str] = ()) -> str:
  """Changes one file below `folder`; returns which and how. Small files are as likely as large ones.

  Args:
    but: parts of the paths of files that are left alone.
  """
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  files = [path for path in files if not any(part in f'{path.relative_to(folder)}' for part in but)]
  file = files[rng.integers(len(files))]
  name = list(KINDS)[rng.integers(len(KINDS))]
  before = file.read_bytes()
  KINDS[name](file, before, rng)
  changed = 'and is as it was' if file.is_file() and file.read_bytes() == before else ''
  return f'{name} {file.relative_to(folder)} {changed}'.strip()


def _flip(file, text, rng):
  i = rng.integers(max(len(text), 1))
  file.write_bytes(text[:i] + bytes([text[i] ^ (1 << rng.integers(8))]) + text[i + 1 :] if text else b'\1')


def _noise(file, text, rng):
  i, size = rng.integers(len(text) + 1), rng.integers(1, 65)
  file.write_bytes(text[:i] + rng.bytes(size) + text[i + size :])


def _zeros(file, text, rng):
  i, size = rng.integers(len(text) + 1), rng.integers(1, 4097)
  file.write_bytes(text[:i] + bytes(len(text[i : i + size])) + text[i + size :])


def _cut(file, text, rng):
  file.write_bytes(text[: rng.integers(len(text) + 1)])


def _longer(file, text, rng):
  file.write_bytes(text + rng.bytes(rng.integers(1, 200)))


def _lines(file, text, rng):
  lines = text.splitlines(keepends=True)
  i = rng.integers(max(len(lines), 1))
  file.write_bytes(b''.join([*lines, *lines[i : i + 1]] if rng.random() < 0.5 else lines[:i] + lines[i + 1 :]))


def _other(file, text, rng):
  others = sorted(path for path in file.parent.rglob('*') if path.is_file() and path != file)
  file.write_bytes(others[rng.integers(len(others))].read_bytes() if others else b'')


def _edited(file, text, rng):
  """As by a program that writes JSON: a value of another kind, a key that is gone, numbers out of bounds."""
  try:
    value = json.loads(text)
  except ValueError:
    return _flip(file, text, rng)
  place, key = _place(value, rng)
  if place is None:
    return file.write_text('null')
  if rng.random() < 0.3:
    del place[key]
  else:
    news = (None, True, '', 'x' * 5000, -1, 0, 1e308, 2**70, [], {}, [[]], {'a': {}}, '\0', 1.5)
    place[key] = news[rng.integers(len(news))]
  return file.write_text(json.dumps(value))


def _place(value, rng):
  place = None, None
  while isinstance(value, dict | list) and value:
    keys = [key for key in value if key != 'crc32'] if isinstance(value, dict) else range(len(value))
    if not keys:
      break
    key = list(keys)[rng.integers(len(keys))]
    place, value = (value, key), value[key]
    if rng.random() < 0.3:
      break
  return place


def _nested(file, text, rng):
  file.write_bytes(b'[' * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000)


def _gone(file, text, rng):
  file.unlink()


def _instead(make):
  def instead(file, text, rng):
    file.unlink()
    make(file)

  return instead


KINDS = {
  'flip': _flip, 'noise': _noise, 'zeros': _zeros, 'cut': _cut, 'longer': _longer, 'lines': _lines, 'other': _other,
  'edited': _edited, 'nested': _nested, 'gone': _gone,
  'pipe': _instead(os.mkfifo), 'folder': _instead(Path.mkdir),
  'link': _instead(lambda file: file.symlink_to('/nowhere')),
}  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--count', type=int, default=300)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  with tempfile.TemporaryDirectory() as temporary:
    subjects, table, faults = Subjects(Path(temporary) / 'subjects'), collections.Counter(), []
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(arguments.count):
      name = list(subjects.actions)[number % len(subjects.actions)]
      kind, what = subjects.outcome(name, np.random.default_rng((arguments.seed, number)))
      table[name, kind] += 1
      if kind == 'FAULT':
        faults.append(f'{number} {name}: {what}')
        print(faults[-1], file=sys.stderr, flush=True)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 2**20
  for (name, kind), count in sorted(table.items()):
    print(f'{name:8} {kind:8} {count}')
  print(f'{len(faults)} faults in {arguments.count}; {more:.2f} GiB more memory than undamaged')
  sys.exit(bool(faults) or more > 1)


if __name__ == '__main__':
  main()
