"""What a checkpoint gives back, how it is written and read; tests/train/test_train.py has kills and full disks."""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import META, equal, like, made, names, newest, write

from moe.balance import rules
from moe.config import BalanceConfig, Config
from moe.errors import UserError
from moe.files import digests
from moe.train import saved as on_disk
from moe.train.checkpoint import Checkpoints, restore_weights, start_from

# -------------------------------------------------------------------------------------------------- what is given back


def test_the_newest_comes_back(two):
  found = newest(two)
  equal(found.state, made(12))
  assert (found.meta['step'], found.meta['tokens'], found.remarks) == (12, 7, [])
  assert names(two) == ['12', '8']


def test_no_checkpoint(tmp_path):
  assert newest(tmp_path / 'checkpoints') is None


def test_weights_alone(two):
  """Of the rule's state only what is asked for: an evaluation, or a run with another rule, wants the bias alone."""
  for keys in (['bias_LE'], ['bias_LE', 'momentum_LE']):
    wanted = like()._replace(opt_state=(), balance={key: like().balance[key] for key in keys})
    found = restore_weights(two.parent, wanted)
    equal((found.state.params, found.state.balance), (made(12).params, {key: made(12).balance[key] for key in keys}))
    assert found.meta['step'] == 12


@pytest.mark.parametrize(('before', 'after'), [(1.0, 0.0), (0.0, 1.0)])
def test_clipping_may_change(tmp_path, before, after):
  folder = write(tmp_path, 3, clip_norm=before)
  found = newest(folder, clip_norm=after)
  equal(found.state, made(3))
  assert found.remarks == []


def test_a_run_without_clipping_of_an_earlier_version(tmp_path):
  """Its chain began with Adam, so that names of moments counted from 0."""
  state = made(3)
  _, *chain = state.opt_state
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state._replace(opt_state=tuple(chain)), META | {'step': 3})
  checkpoints.wait()
  for clip_norm in (0.0, 1.0):
    equal(checkpoints.restore(3, like(clip_norm=clip_norm)).state, state)
  checkpoints.close()


@pytest.mark.parametrize(('before', 'after'), [('float32', 'bfloat16'), ('bfloat16', 'float32')])
def test_moments_are_cast_and_that_is_said(tmp_path, before, after):
  folder = write(tmp_path, 3, moments=before)
  found = newest(folder, moments=after)
  cast = lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16 if after == 'bfloat16' else np.float32)
  expected = made(3, moments=before)
  equal(found.state._replace(opt_state=()), expected._replace(opt_state=()))
  pairs = zip(jax.tree.leaves(found.state.opt_state), jax.tree.leaves(expected.opt_state), strict=True)
  for got, want in pairs:
    equal(got, cast(want) if want.ndim else want)
  (line,) = found.remarks
  assert line == f'the optimizer continues with moments in {after}, cast from {before} of the checkpoint'


@pytest.mark.parametrize('change', ['shape', 'dtype', 'missing', 'more', 'no moments'])
def test_another_model_is_refused(tmp_path, change):
  """Even where Orbax would cast, or give what it has."""
  state = made(3)
  if change == 'no moments':
    state = state._replace(opt_state=())
  elif change == 'missing':
    del state.params['scale_out_D']
  else:
    key = 'scale_new_D' if change == 'more' else 'scale_out_D'
    state.params[key] = jnp.ones(6 if change == 'shape' else 5, jnp.bfloat16 if change == 'dtype' else jnp.float32)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, META | {'step': 3})
  checkpoints.wait()
  message = r'weights only, .*train\.init_from' if change == 'no moments' else r'does not fit the model: scale_\w+_D is'
  with pytest.raises(UserError, match=message):
    checkpoints.restore_newest(like())
  checkpoints.close()
  assert names(tmp_path / 'checkpoints') == ['3'], 'a whole one is not set aside'


# ------------------------------------------------------------------------------------- writing, and reading meanwhile


def test_all_is_synced_and_sealed_before_the_folder_takes_its_name(tmp_path, monkeypatch):
  synced, seal = set(), Checkpoints._seal

  def fsync(descriptor, real=os.fsync):
    synced.add(os.fstat(descriptor).st_ino)
    real(descriptor)

  def sealed(self):
    assert names(self.path) != ['3']
    seal(self)
    (folder,) = self.path.iterdir()
    assert '.orbax-checkpoint-tmp' in folder.name
    everything = [folder, *folder.rglob('*')]
    items = [path for path in everything if path.is_dir() or path.parent != folder or path.name == digests.FILE]
    assert {path.stat().st_ino for path in items} <= synced

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(Checkpoints, '_seal', sealed)
  write(tmp_path, 3)
  assert names(tmp_path / 'checkpoints') == ['3']
  assert (tmp_path / 'checkpoints').stat().st_ino in synced


def test_without_digests_it_does_not_appear(tmp_path, monkeypatch):
  """A disk that fills up, or a kill, between the arrays and the digests."""
  folder = write(tmp_path, 2, keep=1)

  def fails(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(digests, 'write', fails)
  with pytest.raises(UserError, match=r'cannot write a checkpoint .*No space left.*step 2 is the last complete'):
    write(tmp_path, 3, keep=1)
  assert [name for name in names(folder) if name.isdecimal()] == ['2']
  monkeypatch.undo()
  assert len(names(folder)) == 2, 'what is unfinished is there'
  equal(newest(folder).state, made(2))
  assert names(folder) == ['2'], 'and is swept at the next start'


def test_what_is_read_stays_while_newer_ones_are_written(tmp_path):
  """One checkpoint is kept, and a reader takes longer than a step."""
  folder = write(tmp_path, 1, keep=1)
  held = on_disk.Newest(tmp_path)
  write(tmp_path, 2, 3, keep=1)
  assert names(folder) == ['1', '3']
  assert digests.damage(held.path, on_disk.ITEMS) == ''
  del held
  write(tmp_path, 4, keep=1)
  assert names(folder) == ['4']
  assert on_disk.Newest(tmp_path).step == 4


def test_nobody_begins_to_read_what_is_being_deleted(tmp_path, monkeypatch):
  """A reader that waits for its lock then finds the folder gone, and looks for a newer one."""
  folder, rename = write(tmp_path, 1, keep=1), pathlib.Path.rename

  def looked_at(path, target):
    if path.name == '1':
      with open(path / on_disk.META) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return rename(path, target)

  monkeypatch.setattr(pathlib.Path, 'rename', looked_at)
  write(tmp_path, 2, keep=1)
  assert names(folder) == ['2']


def test_a_reader_of_a_replaced_checkpoint_takes_the_newer_one(tmp_path, monkeypatch):
  """On a file system without locks; at most one half is deleted when it looks."""
  folder = write(tmp_path, 1, keep=1)
  read = on_disk.read

  def late(path, parts, exact):
    if path.name == '1':
      write(tmp_path, 2, keep=1)
    return read(path, parts, exact)

  monkeypatch.setattr(on_disk.fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(95, 'not supported')))
  monkeypatch.setattr(on_disk, 'read', late)
  found = restore_weights(tmp_path, like())
  assert found.meta['step'] == 2
  equal(found.state.params, made(2).params)
  assert names(folder) == ['2']


def test_leftovers_of_a_kill_are_swept(copied):
  for name in ('13.orbax-checkpoint-tmp-1', '13.orbax-checkpoint-tmp', '4.deleted'):
    shutil.copytree(copied / '8', copied / name)
  (copied / 'notes.txt').write_text('mine')
  restore_weights(copied.parent, like())
  assert len(names(copied)) == 6, 'who only reads leaves them'
  newest(copied)
  assert names(copied) == ['12', '8', 'notes.txt']


def test_a_file_in_the_place_of_the_folder(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match=r'cannot use .*/checkpoints as the folder of checkpoints: File exists'):
    Checkpoints(tmp_path)
  with pytest.raises(UserError, match=r'cannot read .*/checkpoints: Not a directory'):
    restore_weights(tmp_path, like())


# ------------------------------------------------------------------------------------------- starting from another run


def run_of(path, rule, step=3):
  """A run directory with one checkpoint, whose rule remembers a momentum if it is SMEBU."""
  state = made(step)
  if rule != 'smebu':
    del state.balance['momentum_LE']
  checkpoints = Checkpoints(path)
  checkpoints.save(state, META | {'step': step})
  checkpoints.wait()
  checkpoints.close()
  (path / 'config.json').write_text(json.dumps({'config': dataclasses.asdict(Config(balance=BalanceConfig(rule)))}))
  return path


@pytest.mark.parametrize(
  ('theirs', 'ours', 'momentum'), [('smebu', 'smebu', 'theirs'), ('sign', 'smebu', 'zero'), ('smebu', 'sign', None)]
)
def test_a_rule_starts_from_another_run(tmp_path, theirs, ours, momentum):
  """The same rule goes on with all that it knew, another one from the bias; moments and step are the new run's."""
  balance, fresh = BalanceConfig(ours), made(0)._replace(balance=rules.init(BalanceConfig(ours), 2, 4))
  found = start_from(run_of(tmp_path, theirs), balance, fresh)
  expected = {'bias_LE': made(3).balance['bias_LE']}
  if momentum:
    expected['momentum_LE'] = made(3).balance['momentum_LE'] if momentum == 'theirs' else jnp.zeros((2, 4))
  equal(found.state, made(0)._replace(params=made(3).params, balance=expected))
  assert found.meta['step'] == 3


def test_what_no_run_can_start_from(tmp_path):
  with pytest.raises(UserError, match=r'train\.init_from = .* is not a run directory with checkpoints'):
    start_from(tmp_path, BalanceConfig(), made(0))
  with pytest.raises(UserError, match="bias_rule = 'sign' cannot start from a run with 'multiplicative'"):
    start_from(run_of(tmp_path, 'multiplicative'), BalanceConfig('sign'), made(0))
