"""Exports and imports that are killed: no folder that looks whole, and the next one goes on."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from our_runs import make_run, random_arrays, read_run

from moe.config import Config
from moe.errors import UserError
from moe.files import digests
from moe.files.folder import new_folder
from moe.interop import from_hf, load, shards, to_hf

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST_GB = 20e3 / 1e9
# Dies while it writes the fifth file, with half of it on the disk.
KILLED_EXPORT = """
import os, pathlib, signal, sys
from moe.interop import shards, to_hf
save, files = shards.save_file, []
def save_file(tensors, file, metadata):
  save(tensors, file, metadata)
  files.append(file)
  if len(files) == 5:
    os.truncate(file, file.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
shards.save_file = save_file
to_hf.export_run(*map(pathlib.Path, sys.argv[1:3]), 'float32', float(sys.argv[3]))
"""
# Dies once, as argv[3] says: while the checkpoint is being written, or between it and the run's config.json.
KILLED_IMPORT = """
import os, pathlib, signal, sys
from moe.train import run_dir
from moe.train.checkpoint import Checkpoints
from moe.interop import from_hf
def die(*arguments):
  os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == 'saving':
  Checkpoints._seal = die
else:
  run_dir.describe_run = die
from_hf.import_run(*map(pathlib.Path, sys.argv[1:3]))
"""


def killed(program, *arguments):
  """Runs a program that kills itself."""
  command = [sys.executable, '-c', program, *map(str, arguments)]
  environment = {'JAX_PLATFORMS': 'cpu', 'PATH': '/usr/bin:/bin'}
  result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=environment)
  assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.fixture(scope='module')
def run(tiny_model, tmp_path_factory):
  config = Config(model=tiny_model)
  return make_run(tmp_path_factory.mktemp('interrupted') / 'run', config, random_arrays(config))


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_killed_export_goes_on(run, tmp_path, monkeypatch):
  to_hf.export_run(run, tmp_path / 'expected', 'float32', MOST_GB)
  target, partial = tmp_path / 'hf', tmp_path / '.hf.partial'
  killed(KILLED_EXPORT, run, target, MOST_GB)
  assert not target.exists()
  whole = sorted(partial.glob('*.safetensors'))
  assert len(whole) == 4  # the fifth does not bear its name yet
  assert len(list(partial.glob('*.unfinished'))) == 1
  with whole[0].open('rb+') as stream:
    stream.truncate(whole[0].stat().st_size - 1)  # as a power cut may leave it
  written, write_file = [], shards.write_file

  def counted(file, tensors):
    written.append(file.name)
    write_file(file, tensors)

  monkeypatch.setattr(shards, 'write_file', counted)
  to_hf.export_run(run, target, 'float32', MOST_GB)
  kept = {path.name for path in whole[1:]}
  assert set(written) == {name for name in contents(target) if name.endswith('.safetensors')} - kept
  assert contents(target) == contents(tmp_path / 'expected')
  assert not partial.exists()


def test_another_export_starts_from_nothing(run, tmp_path):
  """Files of other settings are no part of this folder."""
  to_hf.export_run(run, tmp_path / 'expected', 'bfloat16', MOST_GB)
  killed(KILLED_EXPORT, run, tmp_path / 'hf', MOST_GB)
  to_hf.export_run(run, tmp_path / 'hf', 'bfloat16', MOST_GB)
  assert contents(tmp_path / 'hf') == contents(tmp_path / 'expected')


@pytest.mark.parametrize('when', ['saving', 'describing'])
def test_killed_import_goes_on(when, run, tiny_model, tmp_path, monkeypatch):
  to_hf.export_run(run, tmp_path / 'hf', 'float32')
  target, partial = tmp_path / 'again', tmp_path / '.again.partial'
  killed(KILLED_IMPORT, tmp_path / 'hf', target, when)
  assert not target.exists()
  assert partial.exists()
  if when == 'describing':  # the checkpoint is whole and is not made again
    monkeypatch.setattr(from_hf, 'load', None)
  from_hf.import_run(tmp_path / 'hf', target)
  found, step = read_run(target, Config(model=tiny_model))
  assert step == 0
  for name, value in random_arrays(Config(model=tiny_model)).items():
    np.testing.assert_array_equal(found[name], value)
  assert sorted(path.name for path in target.iterdir()) == [
    'checkpoints',
    'config.json',
    'config.py',
    'digests.json',
    'hf',
  ]
  assert [path.name for path in (target / 'checkpoints').iterdir()] == ['0']
  assert not partial.exists()


@pytest.mark.parametrize('when', ['writing', 'sealed'])
def test_export_killed_at_its_end_goes_on(when, run, tmp_path, monkeypatch):
  """What the killed one left of its digests is no part of the folder."""
  write = digests.write

  def die(folder, parts):
    if when == 'sealed':
      write(folder, parts)
    else:
      (folder / f'{digests.FILE}.{"0" * 32}.tmp').touch()
    raise KeyboardInterrupt  # which leaves as much as a kill

  with monkeypatch.context() as patch:
    patch.setattr(digests, 'write', die)
    with pytest.raises(KeyboardInterrupt):
      to_hf.export_run(run, tmp_path / 'hf', 'float32')
  to_hf.export_run(run, tmp_path / 'hf', 'float32')
  to_hf.export_run(run, tmp_path / 'expected', 'float32')
  assert contents(tmp_path / 'hf') == contents(tmp_path / 'expected')
  load.open_checkpoint(tmp_path / 'hf')


def test_who_comes_as_a_folder_takes_its_name_leaves_it_alone(tmp_path, monkeypatch):
  rename = os.rename

  def meanwhile(*names):
    monkeypatch.undo()
    with pytest.raises(UserError, match=r'another process is writing .*hf'), new_folder(tmp_path / 'hf', {}):
      pass
    rename(*names)

  monkeypatch.setattr(os, 'rename', meanwhile)
  with new_folder(tmp_path / 'hf', {}) as folder:
    (folder / 'file').touch()
  assert contents(tmp_path / 'hf') == {'file': b''}


def test_two_at_once(tmp_path):
  with new_folder(tmp_path / 'hf', {}) as first:
    (first / 'file').touch()
    with pytest.raises(UserError, match=r'another process is writing .*hf'), new_folder(tmp_path / 'hf', {}):
      pass
    assert (first / 'file').exists()
  assert contents(tmp_path / 'hf') == {'file': b''}


@pytest.mark.parametrize('make', [os.mkfifo, lambda file: file.write_text('[' * 100_000)])
def test_a_plan_that_is_none_is_made_anew(tmp_path, make):
  partial = tmp_path / '.hf.partial'
  partial.mkdir()
  make(partial / 'plan.json')
  with new_folder(tmp_path / 'hf', {}) as folder:
    (folder / 'file').touch()
  assert [path.name for path in (tmp_path / 'hf').iterdir()] == ['file']
