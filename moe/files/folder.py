"""Folders that appear whole or not at all, and whose making goes on after a kill."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from moe.errors import UserError
from moe.files import MAX_JSON_BYTES, parse_json, read_bytes, sweep_temporaries, write_atomically
from moe.files.lock import try_lock

PLAN, LOCK = 'plan.json', 'lock'


@contextlib.contextmanager
def new_folder(target: Path, plan: dict):
  """Yields a sibling of `target` to fill, renamed to `target` at the end and removed after an error.

  A process that is killed leaves the sibling, '.NAME.partial', which no reader takes for the folder. The next one with
  the same plan finds there what had been done; another plan starts from nothing.

  Args:
    plan: all that the contents follow from, for JSON.

  Raises:
    UserError: `target` exists, another process is making it, or the disk refuses (full, not writable).
  """
  if target.exists() or target.is_symlink():
    raise UserError(f'{target} exists already; choose a new folder')
  partial = target.with_name(f'.{target.name}.partial')
  try:
    partial.mkdir(parents=True, exist_ok=True)
    lock = try_lock(partial / LOCK)
    if lock is None:
      raise UserError(f'another process is writing {target}')
    with lock:
      try:
        if _read(partial / PLAN) != json.loads(json.dumps(plan)):
          _clear(partial)
          write_atomically(partial / PLAN, json.dumps(plan))
        sweep_temporaries(partial)
        yield partial
        (partial / PLAN).unlink()
        os.rename(partial, target)
        (target / LOCK).unlink()  # last: who came before the folder had its name would take it for a killed one's
      except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
  except OSError as error:
    raise UserError(f'cannot write {target}: {error.strerror or error}') from error


def _read(file):
  try:
    return parse_json(read_bytes(file, MAX_JSON_BYTES), str(file))
  except UserError:
    return None


def _clear(partial):
  for path in partial.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name != LOCK:
      path.unlink()
