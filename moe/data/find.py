"""Which files data.paths names: each real file once, and nothing that tools or our own runs leave between them."""

import functools
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe.data.documents import SUFFIXES, suffix
from moe.errors import UserError
from moe.files import regular

SUPPORTED = 'the supported suffixes are ' + ' '.join(SUFFIXES)


def find(paths: str, leave_out: Iterable[Path] = ()) -> list[tuple[str, bool]]:
  """Files behind comma-separated files, folders and globs, sorted: (absolute path, whether an entry names the file).

  A file that several names or links lead to comes once, by a path without links if there is one, else by the first of
  its paths. Links to folders are followed. Below folders and where globs match, these are left out: names that begin
  with a dot, which are tools' own (.ipynb_checkpoints, .git, ._x, .#x), runs and sweeps of ours, and `leave_out`.

  Args:
    leave_out: folders, such as the run's own, which need not exist yet.

  Raises:
    UserError: naming the entry or file that is missing, unsupported, no regular file, or itself to be left out.
  """
  own = frozenset(os.path.realpath(folder) for folder in leave_out)
  explicit: dict[str, bool] = {}
  for entry in paths.split(','):
    if not entry.strip():
      raise UserError(f'config data.paths = {paths!r} has an empty entry between its commas; remove it')
    for path, named in _expand(entry.strip(), own):
      path = os.path.abspath(path)
      explicit[path] = explicit.get(path, False) or named
  same: dict[tuple[int, int] | str, list[str]] = {}
  for path in sorted(explicit):
    same.setdefault(_identity(path, regular(Path(path))), []).append(path)
  best = lambda names: min(names, key=lambda path: (os.path.realpath(path) != path, path)) if names[1:] else names[0]
  return sorted((best(names), any(explicit[path] for path in names)) for names in same.values())


def walk(root: str, own: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
  """(folder, names of its files) for `root` and each real folder below it, once; see `find` for what is left out.

  Raises:
    UserError: a folder cannot be listed.
  """

  def fail(error: OSError):  # os.walk would pass over what it cannot list
    raise UserError(f'cannot list folder {error.filename!r}: {error.strerror}')

  seen, waiting = set(), [root]
  while waiting:  # what links lead to comes last, since it may lie below `root` as well
    for folder, folders, names in os.walk(waiting.pop(0), onerror=fail):
      identity = _identity(folder, os.stat(folder))
      if identity in seen or (folder != root and _is_ours(folder, own)):
        folders.clear()
        continue
      seen.add(identity)
      folders[:] = sorted(name for name in folders if not name.startswith('.'))
      waiting += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
      yield folder, sorted(name for name in names if not name.startswith('.'))


def _expand(entry: str, own: frozenset[str]) -> list[tuple[str, bool]]:
  """Files behind one entry of data.paths, each with whether it was named itself."""
  path = os.path.expanduser(entry)
  if os.path.isdir(path):
    _refuse_own(entry, path, own)
    found = [os.path.join(folder, name) for folder, names in walk(path, own) for name in names if suffix(name)]
    if not found:
      raise UserError(f'folder {entry!r} of data.paths holds no supported file; {SUPPORTED}')
    return [(file, False) for file in found]
  if os.path.exists(path):
    if not suffix(path):
      raise UserError(f'file {entry!r} of data.paths has an unsupported suffix; {SUPPORTED}')
    return [(path, True)]
  if not glob.has_magic(path):
    raise UserError(f'path {entry!r} of data.paths does not exist or cannot be reached; give files, folders or globs')
  root = _fixed(path)
  _refuse_own(entry, root, own)
  found = [file for file in _glob(path, own) if suffix(file) and not os.path.isdir(file)]
  found = [file for file in found if not any(_is_ours(folder, own) for folder in _between(root, file))]
  if not found:
    raise UserError(f'pattern {entry!r} of data.paths matches no supported file; {SUPPORTED}')
  return [(file, False) for file in found]


def _refuse_own(entry, root, own):
  if os.path.realpath(root) in own:
    raise UserError(f'{entry!r} of data.paths is the workdir, where the run writes; give one of the two its own folder')


def _glob(pattern: str, own: frozenset[str]) -> Iterator[str]:
  """As glob.glob(pattern, recursive=True), but `**` enters each real folder once: links may lead in circles."""
  head, deep, tail = _cut(pattern, lambda part: part == '**')
  if not deep:
    yield from glob.glob(pattern)
    return
  for base in filter(os.path.isdir, glob.glob(head)):
    for folder, _ in walk(base, own):
      yield from _glob(os.path.join(glob.escape(folder), tail or '*'), own)


def _fixed(pattern: str) -> str:
  """The folder that a pattern's matches lie below: its parts before the first with a magic character."""
  return _cut(pattern, glob.has_magic)[0]


def _cut(pattern, is_end) -> tuple[str, bool, str]:
  """(the parts before the first for which `is_end` holds, whether there is one, the parts behind it)."""
  parts = pattern.split(os.sep)
  at = next((i for i, part in enumerate(parts) if is_end(part)), len(parts))
  head = os.sep.join(parts[:at]) or (os.sep if at else os.curdir)
  return head, at < len(parts), os.sep.join(parts[at + 1 :])


def _between(root: str, file: str) -> list[str]:
  """Folders of `file` below `root`."""
  parts = os.path.relpath(os.path.dirname(file), root).split(os.sep)
  return [os.path.join(root, *parts[: i + 1]) for i, part in enumerate(parts) if part != os.curdir]


@functools.lru_cache(1 << 16)
def _is_ours(folder: str, own: frozenset[str]) -> bool:
  """Whether `folder` is one of `own`, a sweep's results, or the directory of a run."""
  has = lambda *names: all(os.path.exists(os.path.join(folder, name)) for name in names)
  return os.path.realpath(folder) in own or has('sweep.json') or has('config.json', 'checkpoints')


def _identity(path: str, found: os.stat_result) -> tuple[int, int] | str:
  """Equal for two paths of one file or folder."""
  return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)  # some file systems number nothing
