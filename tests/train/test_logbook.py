"""Rows of a run as it is started again: cut back from the end, and missed where a checkpoint counted them."""

import dataclasses
import io
import json
import os
import pathlib
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from moe.balance import load_history
from moe.config import Config, DataConfig
from moe.errors import UserError
from moe.files import digests, read_rows
from moe.train import logbook, run_dir, tensorboard
from moe.train.logbook import Logbook

LOAD_LE = np.arange(6).reshape(2, 3)


def written(folder, steps, resume=0):
  """A logbook with rows of these steps, closed; returns what `sync` said of it."""
  book = Logbook(folder, resume, 100)
  for step in steps:
    book.write('metrics', {'step': step, 'loss': 1.0 / step, 'text': 'x' * 300})
    book.write_loads(step, LOAD_LE * step)
    if step % 5 == 0:
      book.write('evals', {'step': step})
  sizes = book.sync()
  book.close()
  return sizes


def steps_in(folder, name='metrics'):
  return [row['step'] for row in read_rows(folder / f'{name}.jsonl')]


@pytest.mark.parametrize('block', [1, 7, 100, 1 << 16])
def test_a_resumed_run_keeps_the_rows_up_to_its_step(tmp_path, monkeypatch, block):
  monkeypatch.setattr(logbook, 'BLOCK_BYTES', block)
  written(tmp_path, range(1, 13))
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 13, "lo')
  book = Logbook(tmp_path, 8, 100)
  assert book.last_steps == {'metrics': 8, 'load_history': 8, 'evals': 5}
  book.close()
  assert steps_in(tmp_path) == steps_in(tmp_path, 'load_history') == list(range(1, 9))
  assert steps_in(tmp_path, 'evals') == [5]
  loads = load_history.LoadHistory(tmp_path / load_history.FILE, (2, 3))
  np.testing.assert_array_equal(loads[-1]['load_LE'], LOAD_LE * 8)
  Logbook(tmp_path, 0, 100).close()
  assert steps_in(tmp_path) == []


def test_the_last_steps_evaluation_is_made_again(tmp_path):
  written(tmp_path, [5, 10])
  Logbook(tmp_path, 10, 10).close()
  assert (steps_in(tmp_path, 'evals'), steps_in(tmp_path)) == ([5], [5, 10])


@pytest.mark.parametrize('last_step', [15, 10, 1])
def test_a_run_that_is_to_end_earlier_keeps_its_evaluations_and_has_no_hole(tmp_path, last_step):
  """train.steps may be lowered to the step that was reached, or below; the checkpoint has counted its evaluation."""
  sizes = written(tmp_path, [5, 10, 15])
  book = Logbook(tmp_path, 15, last_step, sizes)
  book.close()
  assert (steps_in(tmp_path, 'evals'), book.holes) == ([5, 10], [])


@pytest.mark.parametrize('name', logbook.FILES)
def test_changed_rows_are_noticed_and_may_be_accepted(tmp_path, name):
  """One flipped bit in a digit, which leaves valid JSON; whoever goes on with it deletes the digests."""
  written(tmp_path, range(1, 11))
  digests.check_logs(tmp_path, whole=True)
  file = tmp_path / f'{name}.jsonl'
  text = bytearray(file.read_bytes())
  text[text.index(b'"step": 5') + 8] ^= 1
  file.write_bytes(text)
  for check in (lambda: Logbook(tmp_path, 10, 100), lambda: digests.check_logs(tmp_path, whole=True)):
    with pytest.raises(UserError, match=rf'{name}\.jsonl is not as it was written.*delete logs\.json there'):
      check()
  assert file.read_bytes() == text
  (tmp_path / 'logs.json').unlink()
  Logbook(tmp_path, 10, 100).close()
  digests.check_logs(tmp_path, whole=True)


def test_digests_of_rows_follow_what_is_cut_and_appended(tmp_path):
  """Killed after rows that no digest counts yet, and between the digests of a cut and the cut itself."""
  written(tmp_path, range(1, 11))
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(b'{"step": 11}\n{"ste')
  digests.check_logs(tmp_path, whole=True)
  rows = (tmp_path / 'metrics.jsonl').read_bytes()
  written(tmp_path, [], resume=4)
  digests.check_logs(tmp_path, whole=True)
  (tmp_path / 'metrics.jsonl').write_bytes(rows)  # as if not cut
  digests.check_logs(tmp_path, whole=True)
  written(tmp_path, [5, 6], resume=4)
  digests.check_logs(tmp_path, whole=True)
  assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_lost_rows_fail_a_reader(tmp_path):
  written(tmp_path, range(1, 11))
  os.truncate(tmp_path / 'metrics.jsonl', 700)
  digests.check_logs(tmp_path, whole=False)  # a run that goes on marks them
  with pytest.raises(UserError, match=r'metrics\.jsonl has 700 bytes, and had 3,\d{3}: rows are missing'):
    digests.check_logs(tmp_path, whole=True)


def test_rows_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
  """Another user's, or on a disk that fails: the first block is asked for, and refused."""
  written(tmp_path, [1])

  def fails(*_):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(digests, 'crc_of', fails)
  with pytest.raises(UserError, match=r"cannot read '.*metrics\.jsonl': Input/output error"):
    digests.check_logs(tmp_path, whole=True)


@pytest.mark.parametrize('text', ['{"metrics.jsonl": 3}', '{"metrics.jsonl": {"bytes": "9"}}', '[', ''])
def test_damaged_digests_of_rows(tmp_path, text):
  written(tmp_path, [1])
  (tmp_path / 'logs.json').write_text(text)
  with pytest.raises(UserError, match=r'logs\.json'):
    Logbook(tmp_path, 1, 100)


@pytest.mark.parametrize('line', [b'\0\0\0', b'[1]', b'{}', b'{"step": "2"}', b'x', b''])
def test_a_damaged_row_near_the_end_is_named(tmp_path, line):
  written(tmp_path, [1])
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(line + b'\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl, the row that ends at byte'):
    Logbook(tmp_path, 1, 100)


def test_zeros_at_the_end_are_cut_in_time_that_grows_with_their_number(tmp_path):
  """What a power failure may leave of a file: one line, as long as it is, of which nothing is read twice."""
  sizes = written(tmp_path, range(1, 11))
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(bytes(1 << 22))
  reads = []

  class Counted(io.FileIO):
    def read(self, size=-1):
      reads.append(size)
      return super().read(size)

  with Counted(tmp_path / 'metrics.jsonl') as file:
    assert next(logbook._lines_from_the_end(file))[0] == bytes(1 << 22)
  assert len(reads) < 20
  Logbook(tmp_path, 10, 100, sizes).close()
  assert (tmp_path / 'metrics.jsonl').stat().st_size == sizes['metrics']


def test_a_pipe_in_the_place_of_rows_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'metrics.jsonl')
  with pytest.raises(UserError, match='a pipe or device'):
    Logbook(tmp_path, 0, 100)


@pytest.mark.parametrize('lost', ['tail', 'file', 'middle', 'half a row'])
def test_rows_that_a_checkpoint_counted_are_missed(tmp_path, lost):
  sizes, file = written(tmp_path, range(1, 11)), tmp_path / 'metrics.jsonl'
  lines = file.read_bytes().splitlines(keepends=True)
  if lost == 'file':
    file.unlink()
  else:
    kept = {'tail': lines[:6], 'middle': lines[:3] + lines[5:], 'half a row': [*lines[:9], lines[9][:20]]}[lost]
    file.write_bytes(b''.join(kept))
  book = Logbook(tmp_path, 10, 100, sizes)
  book.close()
  ends = {'tail': 'ends at step 6', 'file': 'has no rows', 'middle': 'ends at step 10', 'half a row': 'ends at step 9'}
  assert len(book.holes) == 1
  assert book.holes[0].startswith(f'metrics.jsonl {ends[lost]}, ')
  assert 'are missing' in book.holes[0]


def test_rows_that_came_after_the_checkpoint_are_no_hole(tmp_path):
  sizes = written(tmp_path, range(1, 11))
  written(tmp_path, range(11, 14), resume=10)
  for step, logged in ((10, sizes), (10, None), (10, {})):
    book = Logbook(tmp_path, step, 100, logged)
    book.close()
    assert book.holes == []


@pytest.mark.parametrize('full', ['metrics.jsonl', 'tensorboard'])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, full):
  """/dev/full takes bytes into a buffer and refuses them on their way out: when written, and again when closed."""
  book = Logbook(tmp_path, 0, 100)
  file = pathlib.Path('/dev/full').open('wb')  # noqa: SIM115
  if full == 'metrics.jsonl':
    book._files['metrics'].close()
    book._files['metrics'] = file
  else:
    monkeypatch.setattr(tensorboard, 'FLUSH_S', 0)
    book._board._records._writer.close()
    book._board._records._writer = file
  for action in (lambda: book.write('metrics', {'step': 1, 'loss': 2.0}), book.close):
    with pytest.raises(UserError, match=r'cannot write (metrics|tensorboard) in .*: No space left on device'):
      action()
  assert all(file.closed for file in book._files.values())


def test_tensorboard_shows_the_rows_once(tmp_path):
  """Read back by the format alone: records of a length, its checksum, the event and its checksum."""
  for resume in (0, 2):
    written(tmp_path, [resume + 1, resume + 2], resume)
  events = []
  for file in sorted((tmp_path / 'tensorboard').iterdir(), key=lambda file: file.name.split('.')[-1]):
    data = file.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      events.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  assert [event.step for event in events if event.HasField('session_log')] == [1, 3]
  losses = [
    (event.step, {v.tag: v.simple_value for v in event.summary.value}) for event in events if event.summary.value
  ]
  assert losses == [(step, {'loss': pytest.approx(1 / step)}) for step in (1, 2, 3, 4)]


def test_a_rows_bytes_are_on_disk_when_a_checkpoint_counts_them(tmp_path, monkeypatch):
  synced, sync = [], os.fsync
  monkeypatch.setattr(os, 'fsync', lambda number: (synced.append(os.fstat(number).st_ino), sync(number)))
  sizes = written(tmp_path, [5])
  files = [tmp_path / f'{name}.jsonl' for name in logbook.FILES]
  assert {file.stat().st_ino for file in files} <= set(synced)
  assert sizes == {file.stem: file.stat().st_size for file in files}


# ------------------------------------------------------------------------------------------- what the directory says


def run_in(path, saved=False, rows=True, checkpoints=()):
  path.mkdir()
  config = Config(data=DataConfig(paths='a'))
  info = {'config': dataclasses.asdict(config), 'saved': saved}
  (path / 'config.json').write_text(json.dumps(info))
  (path / 'metrics.jsonl').write_text('{"step": 1}\n' if rows else '')
  for name in checkpoints:
    (path / 'checkpoints' / name).mkdir(parents=True)
  return config


@pytest.mark.parametrize(
  ('found', 'gone'),
  [
    ({}, True),  # no folder of checkpoints
    ({'rows': False}, False),  # killed before anything was logged
    ({'checkpoints': ['8.tmp']}, False),  # killed before the first checkpoint
    ({'checkpoints': ['8.tmp'], 'saved': True}, True),  # an empty folder: unmounted, or the steps deleted
    ({'rows': False, 'saved': True}, True),
    ({'checkpoints': ['8'], 'saved': True}, False),
    ({'checkpoints': ['8']}, False),
  ],
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path, found, gone):
  config = run_in(tmp_path / 'run', **found)
  if not gone:
    return run_dir.check_run(tmp_path / 'run', config)
  with pytest.raises(UserError, match='has no checkpoints any more: to start again at step 0 would empty its logs'):
    run_dir.check_run(tmp_path / 'run', config)


def test_checkpoints_that_are_a_file_are_refused_at_the_start(tmp_path):
  config = run_in(tmp_path / 'run', rows=False)
  (tmp_path / 'run' / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='checkpoints is not a folder'):
    run_dir.check_run(tmp_path / 'run', config)


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"config": 1}', '\0' * 9, '[' * 99_999])
def test_a_damaged_config_is_one_line(tmp_path, text):
  config = run_in(tmp_path / 'run', checkpoints=['8'])
  (tmp_path / 'run' / 'config.json').write_text(text)
  for read in (lambda path: run_dir.check_run(path, config), run_dir.read_config):
    with pytest.raises(UserError, match=r'config\.json'):
      read(tmp_path / 'run')


def test_the_owner_sweeps_up_after_killed_writers(tmp_path):
  path = tmp_path / 'run'
  path.mkdir()
  left, mine = path / f'report.html.{"0a" * 16}.tmp', path / 'notes.tmp'
  for file in (left, mine):
    file.write_text('')
  with run_dir.owned(path, Config(), print):
    assert (left.exists(), mine.exists()) == (False, True)
    second = run_dir.owned(path, Config(), print)
    with pytest.raises(UserError, match=f'process {os.getpid()} on .* is at work on the run in'), second:
      pass


@pytest.mark.parametrize('name', logbook.FILES)
def test_rows_in_a_pipe_are_refused_and_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / f'{name}.jsonl')
  with pytest.raises(UserError, match='a pipe or device, not a file'):
    Logbook(tmp_path, 0, 10)


def test_a_row_that_never_ends_is_refused(tmp_path, monkeypatch):
  """Zeros, as some file systems leave them behind a power failure; such a row took time with its square."""
  monkeypatch.setattr(logbook, 'MAX_JSON_BYTES', 1 << 20)
  (tmp_path / 'metrics.jsonl').touch()
  os.truncate(tmp_path / 'metrics.jsonl', 1 << 26)
  with pytest.raises(UserError, match='is longer than 1,048,576 bytes'):
    Logbook(tmp_path, 0, 10)
