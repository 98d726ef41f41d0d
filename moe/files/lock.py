"""Locks that a process holds as long as it lives, so that a kill leaves none behind; and one owner of a run.

`flock` is let go of by the system when the last process that has the file open ends, however it ends. It holds among
the processes of one host, and among hosts on file systems that carry it (NFS, Lustre mounted with -o flock, GPFS). For
those that do not, or have no locks at all, the owner of a run beats: it writes into the lock's file every few seconds,
and who finds words there of an owner that a lock would not tell of watches whether they change before taking over. Not
covered on such a file system: an owner that was suspended for longer than WATCH_S, and two that start at the same time.
"""

import contextlib
import errno
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
from moe.files import open_own, open_regular

BEAT_S, WATCH_S = 5.0, 30.0  # between an owner's beats; how long a newcomer watches for one
WORDS_BYTES = 512  # of an owner's words: always as many, written at once, so that no reader finds half of them
NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK  # Lustre without -o flock, and others
BOOT = Path('/proc/sys/kernel/random/boot_id')  # tells hosts of the same name apart


def try_lock(path: Path) -> IO[bytes] | None:
  """The open file, which holds the lock on `path` until it is closed; None if another has it. Raises OSError, also for
  a link: an owner's words would be written over what it leads to.
  """
  file = _opened(path)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BaseException as error:
    file.close()
    if isinstance(error, BlockingIOError):
      return None
    raise
  return file


def _opened(path):
  return open_own(path, os.O_NOFOLLOW)


@contextlib.contextmanager
def owned(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
  """Holds the lock on `path`, and beats in it, during the block.

  Args:
    what: is owned, for the user.
    say: is told when an owner that no lock tells of must be watched first.

  Raises:
    UserError: another process, which is named, owns it; or the file cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      file, reaches = _lock_if_there_are_locks(path)
      if file:
        stack.enter_context(file)
      words = _words(path)
      if not file or _is_alive(path, words, say, reaches):
        raise UserError(f'{_owner(words)} is at work on {what}; wait until it has ended, or choose another folder')
    except OSError as error:
      raise UserError(f'cannot lock {path}: {error.strerror}') from error
    stack.enter_context(_beating(file))
    yield


def _lock_if_there_are_locks(path):
  """(as `try_lock`, whether the file system has locks)."""
  try:
    return try_lock(path), True
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    return _opened(path), False


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


def _is_alive(path, words, say, reaches) -> bool:
  """Whether the words are of an owner on another host, where our flock may not reach, and go on changing.

  Args:
    reaches: whether flock reaches owners on this one.
  """
  if not words or (reaches and _parsed(words).get('boot') == _boot()):
    return False
  say(f'{_owner(words)} left {path} without a word; watching for {WATCH_S:.0f} s whether it is still there')
  deadline = time.monotonic() + WATCH_S
  while time.monotonic() < deadline:
    time.sleep(WATCH_S / 30)
    if _words(path) not in (words, b''):  # opened anew, as NFS then looks at the server
      return True
  return False


def _words(path) -> bytes:
  with open_regular(path) as file:  # a pipe would be waited for
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
