"""Files that are never half-written."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from moe.errors import UserError


def write_atomically(path: Path, text: str) -> None:
  """Writes `text` to `path` so that readers see the old file or all of the new one. Raises UserError."""
  with replacing(path) as temporary:
    temporary.write_text(text, 'utf-8')


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
