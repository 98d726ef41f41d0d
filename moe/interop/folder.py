"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from moe.errors import UserError


@contextlib.contextmanager
def new_folder(target: Path):
  """Yields a temporary sibling of `target` to fill, renamed to `target` at the end and removed after an exception.

  A process that is killed leaves the sibling, '.NAME.HEX.partial', which no reader takes for the folder.

  Raises:
    UserError: `target` exists, or the disk refuses (full, not writable).
  """
  if target.exists() or target.is_symlink():
    raise UserError(f'{target} exists already; choose a new folder')
  partial = target.with_name(f'.{target.name}.{uuid.uuid4().hex[:8]}.partial')
  try:
    partial.mkdir(parents=True)
    yield partial
    os.rename(partial, target)
  except OSError as error:
    raise UserError(f'cannot write {target}: {error.strerror or error}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
