"""What a checkpoint gives back, and what is noticed; tests/test_train.py has interruption and full disks."""

import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.balance import rules
from moe.config import BalanceConfig, Config, OptimizerConfig
from moe.errors import UserError
from moe.files import digests
from moe.train import saved as on_disk
from moe.train.checkpoint import Checkpoints, abstract_like, restore_weights, start_from
from moe.train.optimizer import make_optimizer
from moe.train.state import TrainState

META = {'tokens': 7, 'seed': 3}


def made(step, **settings):
  """A state of some numbers that follow from the step, with a rule that remembers more than its bias."""
  rng = np.random.default_rng(step)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
  params = {'layers': {'w_router_DE': draw(2, 5, 4), 'w_up_eDF': draw(2, 4, 5, 3)}, 'scale_out_D': draw(5)}
  optimizer = make_optimizer(OptimizerConfig(**settings), 10).init(params)
  optimizer = jax.tree.map(lambda leaf: draw(*leaf.shape).astype(leaf.dtype) if leaf.ndim else leaf + step, optimizer)
  return TrainState(jnp.int32(step), params, {'bias_LE': draw(2, 4), 'momentum_LE': draw(2, 4)}, optimizer)


def like(**settings):
  state = made(0, **settings)
  return abstract_like(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def write(path, *steps, keep=2, **settings):
  checkpoints = Checkpoints(path, keep)
  for step in steps:
    checkpoints.save(made(step, **settings), META | {'step': step, 'data': {'next_batch': step, 'epoch': step / 7}})
  checkpoints.wait()
  checkpoints.close()
  return path / 'checkpoints'


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A run with checkpoints of steps 8 and 12, to copy and damage."""
  return write(tmp_path_factory.mktemp('checkpoints'), 8, 12)


@pytest.fixture
def copied(two, tmp_path):
  """Checkpoints of `two`, in a run directory of the test's own."""
  return shutil.copytree(two, tmp_path / 'run' / 'checkpoints')


def newest(folder, **settings):
  """What a run there resumes from."""
  checkpoints = Checkpoints(folder.parent, 2)
  try:
    return checkpoints.restore_newest(like(**settings))
  finally:
    checkpoints.close()


def equal(found, expected):
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def files(folder):
  return sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())


def flip(file, at=0.5):
  """Turns one bit of a file."""
  content = bytearray(file.read_bytes())
  content[int(at * len(content))] ^= 4
  file.write_bytes(content)


def without_digests(step):
  """Makes of a checkpoint one of an earlier version."""
  (step / digests.FILE).unlink()
  meta = json.loads((step / 'meta/metadata').read_text())
  del meta['digests']
  (step / 'meta/metadata').write_text(json.dumps(meta))


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


# ------------------------------------------------------------------------------------------------------------- damage


def test_digests_are_of_the_files(two):
  """Sizes and CRC-32 by hand, of every file of every item, and every one is noticed when a bit of it turns."""
  known = json.loads((two / '12' / digests.FILE).read_text())
  items = [name.as_posix() for name in files(two / '12') if len(name.parts) > 1]
  assert sorted(known) == items
  for name in items:
    content = (two / '12' / name).read_bytes()
    assert known[name] == {'bytes': len(content), 'crc32': f'{zlib.crc32(content):08x}'}


def test_every_damage_is_named(copied):
  step, rng = copied / '12', np.random.default_rng(0)
  damage = lambda share=(0, 1): digests.damage(step, on_disk.ITEMS, share)
  for name in json.loads((step / digests.FILE).read_text()):
    file = step / name
    content = file.read_bytes()
    for kind in ('bit', 'cut', 'longer', 'gone', 'folder', 'pipe'):
      if kind == 'bit' and content:
        flip(file, rng.random())
      elif kind == 'cut' and content:
        file.write_bytes(content[:-1])
      elif kind in ('bit', 'cut', 'longer'):
        file.write_bytes(content + b'\0')
      else:
        file.unlink()
        if kind == 'folder':
          file.mkdir()
        elif kind == 'pipe':
          os.mkfifo(file)
      assert digests.damage(step, [name.split('/')[0]]).startswith(f'{name} ')
      if kind == 'cut':
        assert [damage((i, 3)) for i in range(3)].count('') == 2, 'one of three processes reads it'
      if kind == 'folder':
        file.rmdir()
      else:
        file.unlink(missing_ok=True)
      file.write_bytes(content)
  assert damage() == ''


@pytest.mark.parametrize('content', ['{', '[]', '{"params/manifest.ocdbt": 3}', '{"params/\\u0000": {}}', None])
def test_damaged_digests(copied, content):
  file = copied / '12' / digests.FILE
  if content is None:
    file.unlink()
  else:
    file.write_text(content)
  found = newest(copied)
  equal(found.state, made(8))
  assert re.match(r'checkpoint .*/12 is damaged: ', found.remarks[0])


@pytest.mark.parametrize('victim', ['params', 'balance', 'optimizer', 'meta', '_CHECKPOINT_METADATA'])
def test_a_flipped_bit_gives_the_same_numbers(copied, victim):
  """Those of the checkpoint before, saying so, or of this one if the bit says nothing."""
  path = copied / '12' / victim
  flip(path if path.is_file() else max(path.rglob('*'), key=lambda file: file.stat().st_size * file.is_file()))
  found = newest(copied)
  step = found.meta['step']
  equal(found.state, made(step))
  assert step == 8 or victim == '_CHECKPOINT_METADATA'
  if step == 8:
    (line,) = found.remarks
    assert re.match(rf'checkpoint .*/12 is damaged.*{victim}.*; going back to step 8, and 12 is now 12\.damaged', line)
    assert 'delete' not in line
    assert names(copied) == ['12.damaged', '8']
  if victim in ('params', 'balance', 'meta'):
    (copied / '12.damaged').rename(copied / '12')
    with pytest.raises(UserError, match=r'checkpoint .*/12 is damaged'):
      restore_weights(copied.parent, like())
    assert names(copied) == ['12', '8'], 'who only reads changes nothing'


def test_a_damaged_one_goes_when_its_step_is_saved_again(copied):
  flip(copied / '12' / 'meta' / 'metadata')
  checkpoints = Checkpoints(copied.parent, 2)
  state = checkpoints.restore_newest(like()).state
  checkpoints.save(state._replace(step=jnp.int32(10)), META | {'step': 10})
  checkpoints.wait()
  assert names(copied) == ['10', '12.damaged', '8']
  checkpoints.save(made(12), META | {'step': 12})
  checkpoints.wait()
  checkpoints.close()
  assert names(copied) == ['10', '12']
  equal(newest(copied).state, made(12))


def test_none_is_whole(copied):
  for step in ('8', '12'):
    flip(copied / step / 'params' / 'manifest.ocdbt')
  with pytest.raises(
    UserError, match=r'/12 is damaged: params/manifest.* none before it is whole: restore one'
  ) as error:
    newest(copied)
  assert 'delete' not in str(error.value)
  assert names(copied) == ['12', '8']


def test_a_pipe_that_no_digest_is_of_is_not_waited_for(copied):
  (copied / '12' / on_disk.OF_ORBAX).unlink()
  os.mkfifo(copied / '12' / on_disk.OF_ORBAX)
  found = newest(copied)
  assert 'is a pipe or device' in found.remarks[0]
  equal(found.state, made(8))


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes')])
def test_a_machine_without_memory_sets_no_checkpoint_aside(copied, monkeypatch, error):
  """On the way to the newest one only: the one before it would have been gone on with."""
  errors = [error]
  read = on_disk.ocp.Checkpointer.restore
  restore = lambda *arguments, **named: read(*arguments, **named) if not errors else (_ for _ in ()).throw(errors.pop())
  monkeypatch.setattr(on_disk.ocp.Checkpointer, 'restore', restore)
  with pytest.raises(UserError, match=r'^there is not enough memory for checkpoint .*/12 \((MemoryError|RESOURCE_EX)'):
    newest(copied)
  assert names(copied) == ['12', '8']


def test_a_folder_under_another_name(copied):
  """A later step than its own, by hand or by a copy: the numbers of its own step are not of this one."""
  (copied / '8').rename(copied / '20')
  found = newest(copied)
  equal(found.state, made(12))
  assert re.search('/20 is damaged or foreign: step in its meta is 8, not 20', found.remarks[0])


def test_arrays_of_another_step(copied):
  """A checkpoint without digests whose optimizer is that of another one."""
  for step in ('8', '12'):
    without_digests(copied / step)
  shutil.rmtree(copied / '12' / 'optimizer')
  shutil.copytree(copied / '8' / 'optimizer', copied / '12' / 'optimizer')
  found = newest(copied)
  equal(found.state, made(8))
  assert 'the state in it is of step 8; going back to step 8' in found.remarks[0]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    *[('step', value) for value in (None, '12', 12.0, True, 8)],
    *[('tokens', value) for value in (None, '7', 7.5, -1, True)],
    *[('seed', value) for value in (None, 'x', 0.5)],
    *[('data', value) for value in (None, [], {'next_batch': 11})],
    *[('data', {'next_batch': 12, 'epoch': value}) for value in (-1, float('nan'), '1')],
    *[('logged', value) for value in ([], {'metrics': None}, {'metrics': -1})],
    ('digests', 'else.json'),
  ],
)
def test_each_field_of_meta_is_checked(copied, field, value):
  """As far as digests do not do it: here none are left to compare with."""
  without_digests(copied / '12')
  file = copied / '12' / 'meta' / 'metadata'
  meta = json.loads(file.read_text())
  for change in ({field: value}, {}):
    new = meta | change if change else {key: value for key, value in meta.items() if key != field}
    file.write_text(json.dumps(new))
    if change or field in ('step', 'tokens'):
      with pytest.raises(UserError, match=rf'/12 is damaged or foreign: {field} in its meta is .*, not ') as error:
        on_disk.read_meta(copied / '12')
      assert len(str(error.value)) < 300 + len(str(copied))
    else:
      assert on_disk.read_meta(copied / '12') == new


def test_processes_agree_on_what_is_damaged(copied, monkeypatch):
  """What one process of two finds in its share is what both raise, with its kind."""

  def both(mine, other):
    gather = lambda array: np.stack([array, np.frombuffer(other.ljust(len(array), b'\0'), np.uint8)])
    monkeypatch.setattr(on_disk.multihost_utils, 'process_allgather', gather)
    return on_disk._agreed(mine)

  def fails(kind):
    raise kind('mine')

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert both(lambda: 'fine', b'') == 'fine'
  for mine, other, kind, text in (
    (lambda: 'fine', b'1theirs', on_disk.Damaged, 'theirs'),
    (lambda: 'fine', b'0theirs', UserError, 'theirs'),
    (lambda: fails(on_disk.Damaged), b'', on_disk.Damaged, 'mine'),
    (lambda: fails(UserError), b'1theirs', UserError, 'mine'),
  ):
    with pytest.raises(UserError, match=text) as error:
      both(mine, other)
    assert error.type is kind


def test_a_foreign_checkpoint_is_refused_and_stays(copied):
  without_digests(copied / '12')
  (copied / '12' / 'meta' / 'metadata').write_text(json.dumps({'format': 'something else'}))
  with pytest.raises(UserError, match="is not of this program: format 'something else'"):
    newest(copied)
  assert names(copied) == ['12', '8']


def test_an_earlier_version_wrote_no_digests(copied):
  without_digests(copied / '12')
  found = newest(copied)
  equal(found.state, made(12))
  assert 'has no digests, being of an earlier version' in found.remarks[0]


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
