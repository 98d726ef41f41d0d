"""The run directory: what a run writes down about itself, and whether a new command may continue it."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import sys

import jax

from moe.config import Config, from_config_dict
from moe.errors import UserError
from moe.files import write_atomically
from moe.state import count_parameters

# What must not change while a run goes on: the rest (learning rate, steps, mesh, dispatch, ...) may.
FIXED = ('model', 'data', 'balance.bias_rule', 'train.seed', 'train.batch_size')
FREE = ('data.cache_dir', 'data.paths', 'data.tokenizer')  # text and tokenizer are compared themselves: data.prepare
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'ml-collections', 'tokenizers')


def check_run(path: pathlib.Path, config: Config) -> None:
  """Checks that `config` may start or continue the run in this directory; makes nothing.

  Raises:
    UserError: holds something else than a run, or the run had other settings that must not change.
  """
  file = path / 'config.json'
  if file.exists():
    _check_same(file, config)
  elif path.exists() and not path.is_dir():
    raise UserError(f'workdir {path} is a file; choose a folder')
  elif path.exists() and (path / 'checkpoints').exists():
    raise UserError(f'workdir {path} has checkpoints but no config.json; choose another workdir')


def make_dir(path: pathlib.Path) -> None:
  """Makes the directory if need be. Raises UserError if it cannot be written to."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / '.writable'
    probe.touch()
    probe.unlink(missing_ok=True)  # another process of the run may have taken it away
  except OSError as error:
    raise UserError(f'workdir {path} is not writable: {error.strerror}; choose another --workdir') from error


def describe_run(path: pathlib.Path, config: Config, mesh, command: str) -> None:
  """Writes config.json: settings, versions, command, device and parameter counts."""
  total, active = count_parameters(config)
  device = mesh.devices.flat[0]
  info = {
    'config': dataclasses.asdict(config),
    'versions': {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
    'command': command,
    'device': f'{mesh.size} x {device.device_kind} ({device.platform})',
    'processes': jax.process_count(),
    'parameters': total,
    'active_parameters': active,
  }
  write_atomically(path / 'config.json', json.dumps(info, indent=2) + '\n')


def read_config(path: pathlib.Path) -> Config:
  """The settings of the run in this directory. Raises UserError if there is none, or one that cannot be read."""
  file = path / 'config.json'
  if not file.is_file() or not (path / 'checkpoints').is_dir():
    raise UserError(f'{path} is not a run directory with config.json and checkpoints')
  try:
    return from_config_dict(json.loads(file.read_text('utf-8'))['config'])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'cannot read {file} as the config of a run: {type(error).__name__} {error}') from error


def command_line() -> str:
  """The command that started this process."""
  return ' '.join(['python', *sys.argv])


def _check_same(file: pathlib.Path, config: Config):
  try:
    old = json.loads(file.read_text('utf-8'))['config']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{file} is not readable as the config of a run; choose another workdir') from error
  new = dataclasses.asdict(config)
  for key, value in _leaves(new):
    if key not in FREE and any(key == fixed or key.startswith(fixed + '.') for fixed in FIXED):
      before = _get(old, key)
      if before != value:
        raise UserError(
          f'the run in {file.parent} has {key} = {before!r} and cannot continue with {value!r}; choose another workdir '
          '(train.init_from starts a new run from its weights)'
        )


def _leaves(tree, prefix=''):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _get(tree, key):
  for part in key.split('.'):
    tree = tree.get(part) if isinstance(tree, dict) else None
  return tree
