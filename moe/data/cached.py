"""What is derived from a corpus and takes long, kept on disk for the next run of the same text."""

import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from moe.config import DataConfig
from moe.errors import UserError
from moe.files import read_bytes, replacing
from moe.files.paths import local_path

DIGEST = 'sha256'  # key of the digest of all other values of a file


def cache_dir(data: DataConfig) -> Path | None:
  """Folder for derived files: `data.cache_dir`, else moe-lossfree below $XDG_CACHE_HOME or ~/.cache.

  None, so that nothing is kept, where there is no home or the folder cannot be made or written to. Raises UserError if
  data.cache_dir is no path.
  """
  if data.cache_dir:
    return local_path(data.cache_dir, 'config data.cache_dir')
  path = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'moe-lossfree'
  try:
    if path.is_absolute():  # '~' stays where there is no home
      path.mkdir(parents=True, exist_ok=True)
  except OSError:
    return None
  return path if os.access(path, os.W_OK | os.X_OK) else None


def use_compilation_cache(data: DataConfig) -> None:
  """Keeps compiled programs on disk, unless JAX's own setting already says where, or there is no cache."""
  folder = cache_dir(data)
  if folder and not jax.config.values['jax_compilation_cache_dir']:
    jax.config.update('jax_compilation_cache_dir', str(folder / 'xla'))


def cached(
  data: DataConfig, name: str, make: Callable[[], dict], fits: Callable[[dict], bool] = lambda values: True
) -> dict[str, np.ndarray]:
  """`make()`, a dict of arrays, numbers and strings, or what it gave when it was last called under this name.

  A file that is damaged, or that anyone else has written, is made again, with a remark on stderr.

  Args:
    data: see `cache_dir`.
    name: of the file, without suffix; names all that the values depend on.
    make: computes them, from nothing that the name leaves out.
    fits: whether values may be what `make` gives.

  Raises:
    UserError: `data.cache_dir` is set and cannot be written to.
  """
  folder = cache_dir(data)
  path = folder and folder / f'{name}.npz'
  if path and os.path.lexists(path):
    try:
      values = _read(path)
      if fits(values):
        return values
      problem = 'its values cannot be'
    except Exception as error:  # damaged zip archives raise nearly anything
      problem = f'{type(error).__name__} {error}'
    print(f'cached {str(path)!r} is damaged or old, and made again: {problem}'[:300], file=sys.stderr)
  values = {key: np.asarray(value) for key, value in make().items()}
  if path:
    _write(path, values, data)
  return values


def _read(path: Path) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(read_bytes(path))) as file:
    values = dict(file)
  if str(values.pop(DIGEST)) != _digest(values):
    raise ValueError('its digest is another')
  return values


def _write(path: Path, values: dict[str, np.ndarray], data: DataConfig):
  try:
    with replacing(path) as temporary, temporary.open('wb') as file:
      # mypy thinks that ** might hold numpy's own allow_pickle.
      np.savez(file, **values, **{DIGEST: np.asarray(_digest(values))})  # type: ignore[arg-type]
  except UserError as error:
    if data.cache_dir:
      raise UserError(f'{error}; data.cache_dir = {data.cache_dir!r} names the folder') from error
    print(f'nothing is kept for the next run: {error}', file=sys.stderr)


def _digest(values: dict[str, np.ndarray]) -> str:
  """sha256 (hex) of names, types, shapes and bytes."""
  sha = hashlib.sha256()
  for key, value in sorted(values.items()):
    sha.update(f'{key} {value.dtype.str} {value.shape}\n'.encode())
    sha.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b'')
  return sha.hexdigest()
