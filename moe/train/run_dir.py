"""The run directory: what a run writes down about itself, and whether a new command may continue it."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator

import jax

import moe
from moe import plugins
from moe.config import Config, from_config_dict
from moe.errors import UserError
from moe.files import lock, read_json, sweep_temporaries, write_json
from moe.ops import attention
from moe.parallel.mesh import platform_of
from moe.train import pipelined
from moe.train.state import count_parameters
from moe.train.step import resolve

CONFIG, LOCK = 'config.json', '.owner'

# What must not change while a run goes on: the rest (learning rate, steps, mesh, dispatch, ...) may.
FIXED = ('model', 'data', 'balance.bias_rule', 'train.seed', 'train.batch_size')
FREE = ('data.cache_dir', 'data.paths', 'data.tokenizer')  # text and tokenizer are compared themselves: data.prepare
# What may differ between the processes of a run: numbers, and places on their hosts.
OF_A_PROCESS = (
  'mesh.process_id',
  'mesh.coordinator',
  'mesh.cpu_devices',
  'data.paths',
  'data.tokenizer',
  'data.cache_dir',
)
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'ml-collections', 'tokenizers')


def check_run(path: pathlib.Path, config: Config) -> None:
  """Checks that `config` may start or continue the run in this directory; makes nothing.

  Raises:
    UserError: holds something else than a run, the run had other settings that must not change, or its checkpoints
      are gone.
  """
  file, checkpoints = path / CONFIG, path / 'checkpoints'
  if path.exists() and not path.is_dir():
    raise UserError(f'workdir {path} is a file; choose a folder')
  if checkpoints.exists() and not checkpoints.is_dir():
    raise UserError(f'{checkpoints} is not a folder; choose another workdir')
  saved = any(checkpoint.name.isdigit() for checkpoint in checkpoints.glob('*'))
  if file.exists():
    info = _read(file)
    plugins.check(info.get('plugins'), f'the run in {path}')
    _check_same(path, info['config'], config)
    if not saved and (info.get('saved') or (_has_rows(path) and not checkpoints.exists())):
      raise UserError(
        f'the run in {path} has no checkpoints any more: to start again at step 0 would empty its logs; mount or '
        'restore its folder checkpoints, or choose another workdir'
      )
  elif saved:
    raise UserError(f'workdir {path} has checkpoints but no {CONFIG}; choose another workdir')


def shared_settings(config: Config) -> dict:
  """The settings in which the processes of a run must not differ, by name; text and tokenizer are compared as such."""
  settings = {key: value for key, value in _leaves(dataclasses.asdict(config)) if key not in OF_A_PROCESS}
  return settings | {'plugins': ', '.join(sorted(f'{one["kind"]} {one["name"]}' for one in plugins.description()))}


@contextlib.contextmanager
def owned(path: pathlib.Path, config: Config, say: Callable[[str], None]) -> Iterator[None]:
  """Makes the directory if need be and is its only owner during the block: of a run's processes, the first is.

  Raises:
    UserError: it cannot be written to, another process owns it, or as `check_run`.
  """
  make_dir(path)
  if config.mesh.process_id:
    yield
    return
  with lock.owned(path / LOCK, f'the run in {path}', say):
    check_run(path, config)  # again: another owner may just have ended
    sweep_temporaries(path)
    yield


def make_dir(path: pathlib.Path) -> None:
  """Makes the directory if need be. Raises UserError if it cannot be written to."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / '.writable'
    probe.touch()
    probe.unlink(missing_ok=True)  # another process of the run may have taken it away
  except OSError as error:
    raise UserError(f'workdir {path} is not writable: {error.strerror}; choose another --workdir') from error


def describe_run(path: pathlib.Path, config: Config, mesh, command: str, step: int = 0, holes=()) -> str:
  """Writes config.json: settings, versions, command, device and parameter counts, and adds to its history of starts.

  Args:
    path: run directory.
    config: as given; every 'auto' in it is written down as what it means on `mesh`, too.
    mesh: the run's devices.
    command: what started it, as one would type it.
    step: that this start goes on from.
    holes: lines about rows that are missing.

  Returns:
    What runs, in one line.
  """
  file = path / CONFIG
  old, resolved = _read(file) if file.exists() else {}, resolve(config, mesh, platform_of(mesh))
  total, active = count_parameters(config)
  device = mesh.devices.flat[0]
  here = {
    'command': command,
    'device': f'{mesh.size} x {device.device_kind} ({device.platform})',
    'processes': jax.process_count(),
    'versions': {'python': platform.python_version(), 'moe': moe.__version__}
    | {name: importlib.metadata.version(name) for name in PACKAGES},
  }
  runs = {
    'mesh': dict(mesh.shape),
    'dispatch': resolved.dispatch,
    'grouped_matmul': resolved.grouped_matmul,
    'attention': attention.implementation(device.platform, resolved.precision.compute),
    'compute': ' + fp8 '.join(filter(None, (resolved.precision.compute, resolved.precision.fp8))),
  }
  if mesh.shape['pipe'] > 1:
    runs['pipeline'] = pipelined.describe(resolved, mesh.shape['pipe'])
  start = {'step': step, 'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} | here | runs
  changed = _changes(old.get('config', {}), dataclasses.asdict(config)) if old else {}
  start |= {key: value for key, value in (('changed', changed), ('holes', list(holes))) if value}
  info = {'config': dataclasses.asdict(config), **here, 'parameters': total, 'active_parameters': active}
  info |= {'plugins': found} if (found := plugins.description()) else {}
  info |= {'resolved': runs, 'saved': bool(step or old.get('saved')), 'starts': [*_starts(old), start]}
  write_json(file, info)
  axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'
  kernels = ', '.join(f'{key} {value}' for key, value in runs.items() if key != 'mesh')
  return (
    f'{total:,} parameters, {active:,} active per token; mesh {axes} on {here["device"]}, '
    f'processes {here["processes"]}; {kernels}'
  )


def note_saved(path: pathlib.Path) -> None:
  """Writes down that the run has had a checkpoint, so that it does not start over should they be lost."""
  info = _read(path / CONFIG)
  if not info.get('saved'):
    write_json(path / CONFIG, info | {'saved': True})


def read_config(path: pathlib.Path) -> Config:
  """The settings of the run in this directory. Raises UserError if there is none, or one that cannot be read."""
  if not (path / CONFIG).is_file() or not (path / 'checkpoints').is_dir():
    raise UserError(f'{path} is not a run directory with {CONFIG} and checkpoints')
  info = _read(path / CONFIG)
  plugins.check(info.get('plugins'), f'the run in {path}', but='metric')  # which says nothing of the model
  return from_config_dict(info['config'])


def command_line() -> str:
  """The command that started this process."""
  return ' '.join(['python', *sys.argv])


def _read(file: pathlib.Path) -> dict:
  """config.json. Raises UserError: cannot be read, or has no settings."""
  info = read_json(file)
  if not isinstance(info.get('config'), dict):
    raise UserError(f"{file} has no section 'config', so it is not of a run")
  return info


def _starts(info: dict) -> list:
  """The history of starts; of a run from before there was one, what is known of its last."""
  if isinstance(starts := info.get('starts'), list):
    return starts
  keys = [key for key in ('command', 'device', 'processes', 'versions') if key in info]
  return [{key: info[key] for key in keys}] if keys else []


def _has_rows(path: pathlib.Path) -> bool:
  metrics = path / 'metrics.jsonl'
  return metrics.is_file() and metrics.stat().st_size > 0


def _changes(old: dict, new: dict) -> dict:
  """[before, now] of each setting that another start had otherwise."""
  return {key: [_get(old, key), value] for key, value in _leaves(new) if _get(old, key) != value}


def _check_same(path: pathlib.Path, old: dict, config: Config):
  for key, value in _leaves(dataclasses.asdict(config)):
    if key not in FREE and any(key == fixed or key.startswith(fixed + '.') for fixed in FIXED):
      before = _get(old, key)
      if before != value:
        raise UserError(
          f'the run in {path} has {key} = {before!r} and cannot continue with {value!r}; choose another workdir '
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
