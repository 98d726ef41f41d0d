"""One owner of a run: among processes, among threads, after a kill, and among hosts that flock does not reach."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe.errors import UserError
from moe.files import lock

HOLD = """import sys, time
from moe.files import lock
held = lock.owned(lock.Path(sys.argv[1]), "it", print)
held.__enter__()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, 'BEAT_S', 0.02)
  monkeypatch.setattr(lock, 'WATCH_S', 0.3)


def refused(file, said=()):
  try:
    with lock.owned(file, 'the run', [*said].append):
      return ''
  except UserError as error:
    return str(error)


def test_a_second_owner_is_refused_until_the_first_has_ended(tmp_path):
  file = tmp_path / 'owner'
  with lock.owned(file, 'the run', print):
    for _ in range(2):
      assert f'process {os.getpid()} on ' in refused(file)
  assert refused(file) == ''
  assert file.read_bytes() == b'', 'no words of an owner that ended by itself'


def test_errors_of_the_owner_pass_through_and_free_the_run(tmp_path):
  with pytest.raises(OSError, match='mine'), lock.owned(tmp_path / 'owner', 'the run', print):
    raise OSError('mine')
  assert refused(tmp_path / 'owner') == ''


def test_a_killed_owner_leaves_no_lock(tmp_path):
  file = tmp_path / 'owner'
  with subprocess.Popen([sys.executable, '-c', HOLD, str(file)], stdout=subprocess.PIPE, text=True) as other:
    assert other.stdout.readline() == 'held\n'
    assert f'process {other.pid} on ' in refused(file)
    other.send_signal(signal.SIGKILL)
    other.wait()
  start = time.monotonic()
  assert refused(file) == ''
  assert time.monotonic() - start < lock.WATCH_S / 2, 'its host is ours, where flock is the truth'


def elsewhere(file, beats):
  """What an owner on another host has in the file; our flock does not see it."""
  words = {'host': 'far', 'boot': 'another', 'process': 7, 'beats': beats}
  file.write_bytes(json.dumps(words).encode().ljust(lock.WORDS_BYTES))


def test_an_owner_on_a_host_that_flock_does_not_reach_is_seen_to_beat(tmp_path, quick):
  file, ended = tmp_path / 'owner', threading.Event()

  def beat():
    beats = 0
    while not ended.wait(0.02):
      beats += 1
      elsewhere(file, beats)

  elsewhere(file, 0)
  thread = threading.Thread(target=beat)
  thread.start()
  try:
    assert refused(file).startswith('process 7 on far is at work on the run')
  finally:
    ended.set()
    thread.join()
  said = []
  with lock.owned(file, 'the run', said.append):  # it beats no more: it was killed
    pass
  assert said[0].startswith('process 7 on far left ')


def test_an_owner_beats(tmp_path, quick):
  file = tmp_path / 'owner'
  with lock.owned(file, 'the run', print):
    seen = set()
    while len(seen) < 3:
      seen.add(json.loads(file.read_bytes() or '{"beats": -1}')['beats'])
  assert len(seen) == 3


@pytest.mark.parametrize('words', [b'\0' * 40, b'[' * 5000, b'{"host": 1}', b'x'])
def test_a_lock_may_hold_anything(tmp_path, quick, words):
  file = tmp_path / 'owner'
  file.write_bytes(words)
  assert refused(file) == ''
  with lock.try_lock(file):
    file.write_bytes(words)
    assert refused(file).startswith('another process is at work')


def test_a_lock_that_cannot_be_written(tmp_path):
  (tmp_path / 'owner').mkdir()
  assert refused(tmp_path / 'owner').startswith('cannot lock')


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
  pipe, kept, link = tmp_path / 'pipe', tmp_path / 'kept', tmp_path / 'link'
  os.mkfifo(pipe)
  assert 'it is a pipe or device, not a file' in refused(pipe)
  kept.write_text('something of the user')
  link.symlink_to(kept)
  assert 'cannot lock' in refused(link)
  assert kept.read_text() == 'something of the user', 'words written through a link'


@pytest.mark.parametrize('number', lock.NO_LOCKS)
def test_where_there_are_no_locks_the_beats_of_an_owner_on_this_host_count(tmp_path, quick, monkeypatch, number):
  def flock(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(lock.fcntl, 'flock', flock)
  file = tmp_path / 'owner'
  with lock.owned(file, 'the run', print):
    assert f'process {os.getpid()} on ' in refused(file)
  assert refused(file) == ''
  file.write_bytes(json.dumps({'host': 'here', 'boot': lock._boot(), 'process': 7, 'beats': 3}).encode())  # killed
  assert refused(file) == ''
