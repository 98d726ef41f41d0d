"""Damaged checkpoints: what is noticed, what is gone back to, and what is refused."""

import json
import os
import re
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import META, equal, files, flip, like, made, names, newest, without_digests

from moe.errors import UserError
from moe.files import digests
from moe.train import saved as on_disk
from moe.train.checkpoint import Checkpoints, restore_weights


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
