"""Locks that a process holds as long as it lives, so that a kill leaves none behind; and one owner of a run.

`flock` is let go of by the system when the last process that has the file open ends, however it ends. It holds among
the processes of one host, and among hosts on file systems that carry it (NFS, Lustre mounted with -o flock, GPFS). For
those that do not, the owner of a run beats: it writes into the lock's file every few seconds, and who finds words from
another host there watches whether they change before taking over. Not covered: an owner that was suspended for longer
than WATCH_S on such a file system.
"""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from moe.errors import UserError
from moe.files import open_own

BEAT_S, WATCH_S = 5.0, 30.0  # between an owner's beats; how long a newcomer watches for one
WORDS_BYTES = 512  # of an owner's words: always as many, written at once, so that no reader finds half of them
BOOT = Path('/proc/sys/kernel/random/boot_id')  # tells hosts of the same name apart


def try_lock(path: Path) -> IO[bytes] | None:
  """The open file, which holds the lock on `path` until it is closed; None if another has it. Raises OSError, also for
  a link: an owner's words would be written over what it leads to.
  """
  file = open_own(path, os.O_NOFOLLOW)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BaseException as error:
    file.close()
    if isinstance(error, BlockingIOError):
      return None
    raise
  return file


@contextlib.contextmanager
def owned(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
  """Holds the lock on `path`, and beats in it, during the block.

  Args:
    what: is owned, for the user.
    say: is told when an owner on another host must be watched first.

  Raises:
    UserError: another process, which is named, owns it; or the file cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      file = try_lock(path)
      words = _words(path)
      if file:
        stack.enter_context(file)
      if not file or _is_alive(path, words, say):
        raise UserError(f'{_owner(words)} is at work on {what}; wait until it has ended, or choose another folder')
    except OSError as error:
      raise UserError(f'cannot lock {path}: {error.strerror}') from error
    stack.enter_context(_beating(file))
    yield


@contextlib.contextmanager
def _beating(file):
  ended = threading.Event()

  def beat():
    for beats in itertools.count(1):
      if ended.wait(BEAT_S):
        return
      _write(file, beats)

  _write(file, 0)
  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError):
      file.truncate(0)  # the owner ended by itself: nobody need watch for it


def _write(file, beats):
  """An owner's words. A disk that refuses them does not end the run, which has the lock all the same."""
  words = {'host': platform.node(), 'boot': _boot(), 'process': os.getpid(), 'beats': beats}
  with contextlib.suppress(OSError):
    os.pwrite(file.fileno(), json.dumps(words).encode().ljust(WORDS_BYTES), 0)
    os.fsync(file.fileno())


def _is_alive(path, words, say) -> bool:
  """Whether the words are of an owner on another host, where our flock may not reach, and go on changing."""
  if not words or _parsed(words).get('boot') == _boot():
    return False
  say(f'{_owner(words)} left {path} without a word; watching for {WATCH_S:.0f} s whether it is still there')
  deadline = time.monotonic() + WATCH_S
  while time.monotonic() < deadline:
    time.sleep(WATCH_S / 30)
    if _words(path) not in (words, b''):  # opened anew, as NFS then looks at the server
      return True
  return False


def _words(path) -> bytes:
  with path.open('rb', buffering=0) as file:
    return file.read(WORDS_BYTES)


def _owner(words) -> str:
  found = _parsed(words)
  return f'process {found["process"]} on {found["host"]}' if {'process', 'host'} <= found.keys() else 'another process'


def _parsed(words) -> dict:
  """An owner's words, or {}: a lock's file may hold anything."""
  try:
    found = json.loads(words)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _boot() -> str:
  return BOOT.read_text().strip() if BOOT.exists() else platform.node()
