"""Digests of a folder's files, so that what a disk, a copy or a power failure changed later is found before it is used.

A checkpoint, an exported folder and what a run keeps of its tokenizer have FILE, with the digest of each file; a run
has LOGS, with those of the beginnings of the files that it appends rows to.

A digest is size and CRC-32: one in 2**32 damages by chance passes, no flipped bit does, and a core reads some 2 GB/s
where SHA-256 without its own instructions reads a tenth of that.
"""

import concurrent.futures
import json
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from moe import files
from moe.errors import UserError

FILE, LOGS = 'digests.json', 'logs.json'
THREADS, BLOCK_BYTES = 8, 1 << 22


def write(folder: Path, parts: Iterable[str]) -> None:
  """Writes FILE with the digest of each of `parts`, files and sub-folders; all of it is synced to the disk.

  Raises:
    OSError, UserError: the disk refuses.
  """
  paths = _files(folder, parts)
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    found = dict(zip(paths, pool.map(lambda name: _digest(folder / name, sync=True), paths), strict=True))
  _write(folder / FILE, found)
  for inner in {folder, *(folder / name for path in paths for name in Path(path).parents)}:
    files.sync_folder(inner)


def check(folder: Path, parts: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
  """Raises UserError if there is a FILE and something under `parts` differs from it; see `damage`."""
  if os.path.lexists(folder / FILE) and (why := damage(folder, parts, share)):
    raise UserError(f'{folder}: {why}; restore it, or delete {FILE} there if the change is meant')


def write_logs(folder: Path, found: dict[str, tuple[int, int]]) -> None:
  """Writes LOGS: by file, how many bytes of rows are in it, and their CRC-32. Raises UserError."""
  _write(folder / LOGS, {name: _described(*digest) for name, digest in found.items()})


def check_logs(folder: Path, whole: bool) -> None:
  """Compares the files in LOGS, if there is one, with it.

  Args:
    whole: a file that has become shorter is an error, too.

  Raises:
    UserError: rows were changed after they were written, or are missing.
  """
  known = files.read_json(folder / LOGS) if os.path.lexists(folder / LOGS) else {}
  for name, digest in known.items():
    size = digest.get('bytes') if isinstance(digest, dict) else None
    if type(size) is not int:
      raise UserError(f'{folder / LOGS} is damaged: {name} has no number of bytes; restore it, or delete it')
    found = files.regular(folder / name).st_size if os.path.lexists(folder / name) else 0
    if found < size and whole:
      why = f'has {found:,} bytes, and had {size:,}: rows are missing'
    elif found >= size and size and _beginning(folder / name, size) != digest:
      why = f'is not as it was written: the CRC-32 of its first {size:,} bytes differs'
    else:
      continue
    raise UserError(f'{folder / name} {why}; restore it, or delete {LOGS} there to go on with it as it is')


def damage(folder: Path, parts: Iterable[str] | None, share: tuple[int, int] = (0, 1)) -> str:
  """What differs from FILE under `parts`, in a few words that name the file; '' if nothing does.

  Args:
    parts: files and sub-folders; None: all that FILE names.
    share: (i, n): of the files, only each n-th from the i-th on is read; n processes together read all of them.
  """
  try:
    known = files.read_json(folder / FILE)
  except UserError as error:
    return str(error)
  wanted = sorted(name for name in known if parts is None or name.split('/')[0] in parts)[share[0] :: share[1]]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    found = pool.map(lambda name: _difference(folder / name, known[name]), wanted)
    return next((f'{name} {difference}' for name, difference in zip(wanted, found, strict=True) if difference), '')


def _files(folder, parts):
  inside = [path for part in parts for path in ((folder / part), *(folder / part).rglob('*'))]
  return sorted(path.relative_to(folder).as_posix() for path in inside if path.is_file())


def _write(path, found):
  files.write_atomically(path, json.dumps(found, indent=1))


def _difference(path, known):
  try:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
      return 'is not a file'
    if not isinstance(known, dict) or found.st_size != known.get('bytes'):
      return f'has {found.st_size:,} bytes, not those that were written'
    return '' if _digest(path) == known else 'is not as it was written: its CRC-32 differs'
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    return f'cannot be read: {getattr(error, "strerror", None) or error}'


def _digest(path, sync=False):
  with open(path, 'rb') as file:
    found = _described(*crc_of(file))
    if sync:
      os.fsync(file.fileno())
  return found


def _beginning(path, size):
  with files.open_regular(path) as file:
    return _described(*crc_of(file, size))


def _described(size, crc):
  return {'bytes': size, 'crc32': f'{crc:08x}'}


def crc_of(file: BinaryIO, most_bytes: int | None = None) -> tuple[int, int]:
  """(bytes, their CRC-32) of what is read from an open file, up to most_bytes of it. Raises OSError."""
  size = crc = 0
  while block := file.read(BLOCK_BYTES if most_bytes is None else min(BLOCK_BYTES, most_bytes - size)):
    size, crc = size + len(block), zlib.crc32(block, crc)
  return size, crc
