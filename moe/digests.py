"""Digests of a folder's files, so that what a disk, a copy or a power failure changed later is found before it is used.

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

from moe import files
from moe.errors import UserError

FILE = 'digests.json'
THREADS, BLOCK_BYTES = 8, 1 << 22


def write(folder: Path, parts: Iterable[str]) -> None:
  """Writes FILE with the digest of each file under the sub-folders `parts`; all of it is synced to the disk.

  Raises:
    OSError: the disk refuses.
  """
  paths = _files(folder, parts)
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    found = dict(zip(paths, pool.map(lambda name: _digest(folder / name, sync=True), paths), strict=True))
  with (folder / FILE).open('w', encoding='utf-8') as file:
    json.dump(found, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  for inner, _, _ in os.walk(folder):
    files.sync_folder(Path(inner))


def damage(folder: Path, parts: Iterable[str], share: tuple[int, int] = (0, 1)) -> str:
  """What differs from FILE under `parts`, in a few words that name the file; '' if nothing does.

  Args:
    share: (i, n): of the files, only each n-th from the i-th on is read; n processes together read all of them.
  """
  try:
    known = files.read_json(folder / FILE)
  except UserError as error:
    return str(error)
  wanted = sorted(name for name in known if name.split('/')[0] in parts)[share[0] :: share[1]]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    found = pool.map(lambda name: _difference(folder / name, known[name]), wanted)
    return next((f'{name} {difference}' for name, difference in zip(wanted, found, strict=True) if difference), '')


def _files(folder, parts):
  return sorted(
    path.relative_to(folder).as_posix() for part in parts for path in (folder / part).rglob('*') if path.is_file()
  )


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
  size = crc = 0
  with open(path, 'rb') as file:
    while block := file.read(BLOCK_BYTES):
      size, crc = size + len(block), zlib.crc32(block, crc)
    if sync:
      os.fsync(file.fileno())
  return {'bytes': size, 'crc32': f'{crc:08x}'}
