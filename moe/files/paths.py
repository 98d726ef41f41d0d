"""Paths and Python files as users give them, where anything may stand."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from moe.errors import UserError, short
from moe.files import read_bytes

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE / 'configs'  # where a wheel puts them
if not CONFIGS.is_dir():
  CONFIGS = PACKAGE.parent / 'configs'  # of a checkout
COMMAND = sys.executable, str(PACKAGE / '__main__.py')  # starts `moe` again, also where it is not installed

ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')  # gs://bucket, or what pathlib makes of it: gs:/bucket


def refuse_address(text: str, name: str) -> None:
  """Raises UserError if `text`, given as `name`, is an address such as gs://bucket/run and no path."""
  if ADDRESS.match(text):
    raise UserError(f'{name} = {text!r} is an address; only paths of this machine work, such as a mounted bucket')


def local_path(text: str | Path, name: str) -> Path:
  """The path that a user gave as `name`, with '~' expanded. Nothing need be there.

  Raises:
    UserError: nothing, an address (gs://bucket/run), '~' of a user without a home, or a path that this system cannot
      have.
  """
  if not isinstance(text, (str, Path)) or not str(text):
    raise UserError(f'{name} = {short(text)} must be the path of a file or folder')
  refuse_address(str(text), name)
  try:
    path = Path(text).expanduser()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      os.stat(path)
  except RuntimeError as error:  # what pathlib raises where there is no home
    raise UserError(f'{name} = {str(text)!r}: {error}; give the path without ~') from error
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path
    raise UserError(f'{name} = {str(text)!r}: {getattr(error, "strerror", None) or error}') from error
  return path


def output_file(text: str, name: str, suffixes: Collection[str]) -> Path:
  """The path that a user gave as `name` for a file to be written: asked before the work, not when it is lost.

  Args:
    suffixes: of files that can be written, such as '.png'.

  Raises:
    UserError: as `local_path`; another suffix, a folder, or in a folder that is not there.
  """
  path = local_path(text, name)
  if path.suffix.lower() not in suffixes:
    raise UserError(f'{name} = {text!r} must end in {" or ".join(suffixes)}')
  if path.is_dir() or not path.parent.is_dir():
    why = 'it is a folder' if path.is_dir() else f'there is no folder {str(path.parent)!r}'
    raise UserError(f'{name} = {text!r} cannot be written: {why}')
  return path


def config_file(text: str, name: str) -> Path:
  """The file of a config that a user gave as `name`: by its path, or as 'tiny' for that of configs/.

  Raises:
    UserError: as `local_path`; or there is neither such a file nor such a config.
  """
  path = local_path(text, name)
  packaged = CONFIGS / f'{path.name}.py'
  if not path.suffix and len(path.parts) == 1 and not path.is_file() and packaged.is_file():  # a folder may be a run
    return packaged
  if not path.exists():
    known = ', '.join(sorted(file.stem for file in CONFIGS.glob('*.py')))
    raise UserError(f'{name} = {text!r} is no file, and no config that comes with this package: {known}')
  return path


def run_python(path: Path, name: str) -> dict[str, Any]:
  """What a Python file that a user gave as `name` defines. Raises UserError: unreadable, or it raises."""
  try:
    source = read_bytes(path)
  except UserError as error:
    raise UserError(f'{name} is no Python file that runs: {error}') from error
  with users_code(path, name):
    defined = {'__name__': path.stem, '__file__': str(path)}
    exec(compile(source, str(path), 'exec'), defined)
    return defined


@contextlib.contextmanager
def users_code(path: Path, name: str) -> Iterator[None]:
  """Around code of a user's Python file: whatever it raises is a UserError with its line."""
  try:
    yield
  except (UserError, KeyboardInterrupt):
    raise
  except BaseException as error:  # SystemExit, CancelledError, one of its own
    raise mistake(path, name, error) from error


def mistake(path: Path, name: str, error: BaseException) -> UserError:
  """What a user is told of an error that running a Python file, given as `name`, has brought."""
  line, says = line_of(path, error), error.msg if _is_in(error, path) else error
  where = f', line {line}' if line else ''
  return UserError(f'{name} = {str(path)!r}{where}: {type(error).__name__}: {says}')


def line_of(path: Path, error: BaseException) -> int | None:
  """The last line of a Python file that was run when an error came, or the line that is no Python; None without one."""
  if _is_in(error, path):
    return error.lineno
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
  return lines[-1] if lines else None


def _is_in(error: BaseException, path: Path) -> TypeGuard[SyntaxError]:
  return isinstance(error, SyntaxError) and error.filename == str(path)
