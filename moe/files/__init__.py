"""Files that are never half-written, and never believed: whatever reads JSON that this process did not just write
does so here, so that a file which a disk, a power failure or an editor damaged is one line for the user.
"""

import contextlib
import errno
import json
import os
import re
import stat
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moe.errors import UserError

MAX_JSON_BYTES = 1 << 28  # parsed, JSON takes some ten times its size
_SEAL = re.compile(rb',\n *"crc32": "([0-9a-f]{8})"\n}\n\Z')


def write_atomically(path: Path, text: str) -> None:
  """Writes `text` to `path` so that readers see the old file or all of the new one. Raises UserError."""
  with replacing(path) as temporary, temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())  # or a power failure may leave the new name with nothing behind it


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A file to write, which becomes `path` at the end of the block, unless that raises. Raises UserError."""
  temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')  # unique among processes of all hosts
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield temporary
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'cannot write {str(path)!r}: {error.strerror}') from error


def sync_folder(folder: Path) -> None:
  """Waits until the names in `folder` are on the disk, where its file system can do so. Raises OSError."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.EBADF):  # CIFS, some of FUSE
      raise
  finally:
    os.close(descriptor)


def read_bytes(path: Path, most_bytes: int | None = None) -> bytes:
  """Contents of a regular file: pipes and devices, which may never end, are refused before they are opened.

  Args:
    most_bytes: larger files are refused; None: any size.

  Raises:
    UserError: missing, unreadable, not a regular file, or too large.
  """
  try:
    with open_regular(path, most_bytes) as file:
      return file.read()
  except MemoryError as error:
    raise UserError(f'cannot read {str(path)!r}: it is larger than the memory') from error


@contextlib.contextmanager
def open_regular(path: Path, most_bytes: int | None = None) -> Iterator[BinaryIO]:
  """A regular file, open for reading. Raises UserError, also where reading in the block fails: as `read_bytes`."""
  regular(path, most_bytes)
  try:
    with open(path, 'rb') as file:
      yield file
  except OSError as error:
    raise UserError(f'cannot read {str(path)!r}: {error.strerror}') from error


def regular(path: Path, most_bytes: int | None = None) -> os.stat_result:
  """Status of a regular file, behind links. Raises UserError as `read_bytes`, which reads it."""
  try:
    found = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise UserError(f'cannot read {str(path)!r}: {getattr(error, "strerror", None) or error}') from error
  if not stat.S_ISREG(found.st_mode):
    kind = 'a folder' if stat.S_ISDIR(found.st_mode) else 'a pipe or device'
    raise UserError(f'cannot read {str(path)!r}: it is {kind}, not a file')
  if most_bytes is not None and found.st_size > most_bytes:
    raise UserError(f'{str(path)!r} has {found.st_size:,} bytes; at most {most_bytes:,} are read')
  return found


def open_own(path: Path, flags: int = 0) -> BinaryIO:
  """A file of ours to read and write, unbuffered, made if missing. Raises OSError, also for a pipe or device, for whose
  other end opening it as usual would wait.

  Args:
    flags: of os.open, beside O_RDWR and O_CREAT.
  """
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | flags, 0o666)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise OSError(errno.EINVAL, 'it is a pipe or device, not a file', str(path))
  return os.fdopen(descriptor, 'r+b', buffering=0)


def write_json(path: Path, value: dict[str, Any], indent: int = 2) -> None:
  """Writes a JSON object atomically, its last key 'crc32' the CRC-32 of the text before it. Raises UserError.

  So `read_json` notices whatever a disk or an editor changed in it later; who means a change deletes that key.
  """
  text = json.dumps(value, indent=indent, allow_nan=False).removesuffix('}').rstrip()
  write_atomically(path, f'{text},\n{" " * indent}"crc32": "{zlib.crc32(text.encode()):08x}"\n}}\n')


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file. Raises UserError: as `read_bytes`, no JSON object, or not as `write_json` left it."""
  text = read_bytes(path, MAX_JSON_BYTES)
  value, sealed = parse_json(text, str(path)), _SEAL.search(text)
  if value.pop('crc32', None) is None:
    return value  # of an older version, or of other programs
  if not sealed or int(sealed[1], 16) != zlib.crc32(text[: sealed.start()]):
    raise UserError(
      f'{path} was changed after it was written: its CRC-32 differs; restore it, or delete its crc32 if the change is '
      'meant'
    )
  return value


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
  """The JSON object that `text` spells. Raises UserError, which begins with `where`, if it spells none."""
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise UserError(f'{where} is no valid JSON: it is nested too deeply') from error
  except ValueError as error:  # UnicodeDecodeError and numbers of thousands of digits, too
    raise UserError(f'{where} is no valid JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{where} holds no JSON object, but {type(value).__name__}')
  return value


def read_rows(path: Path, again: bool = True) -> list[dict[str, Any]]:
  """Rows of a .jsonl file of a run, each with an int 'step'; [] if there is no such file.

  A last line without an end was cut off while being written, and is left out.

  Args:
    again: later rows may replace earlier ones, from their step on, as where runs of old versions were resumed.

  Raises:
    UserError: naming the line that is no JSON object, has no int 'step' of at least 0, or comes out of order.
  """
  if not os.path.lexists(path):
    return []
  *lines, _ = read_bytes(path).split(b'\n')
  rows: list[dict[str, Any]] = []
  for number, line in enumerate(lines, 1):
    where = f'{path} line {number}'
    row = parse_json(line, where)
    step = step_of(row, where)
    while rows and rows[-1]['step'] >= step:
      if not again:
        raise out_of_order(where, step)
      rows.pop()
    rows.append(row)
  return rows


def out_of_order(where: str, step: int) -> UserError:
  """What a row is that does not come after the one before."""
  return UserError(f'{where} has step {step}, which is not after the row before')


def step_of(row: dict[str, Any], where: str) -> int:
  """The step of a run's row. Raises UserError, which begins with `where`, if it is no number of steps."""
  step = row.get('step')
  if type(step) is not int or not 0 <= step < 1 << 53:
    raise UserError(f'{where} has step {str(step)[:40]!r}; it must be a number of steps')
  return step


def sweep_temporaries(folder: Path) -> None:
  """Takes away what writers that were killed left in a folder that nobody else writes to. Raises OSError."""
  for path in folder.glob('*.tmp'):
    if re.fullmatch(r'.*\.[0-9a-f]{32}\.tmp', path.name) and path.is_file():
      path.unlink(missing_ok=True)
