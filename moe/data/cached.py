"""What is derived from a corpus and takes long, kept on disk for the next run of the same text."""

import zipfile
from collections.abc import Callable

import numpy as np

from moe.config import DataConfig
from moe.data.tokenizer import cache_dir
from moe.errors import UserError
from moe.files import replacing


def cached(data: DataConfig, name: str, make: Callable[[], dict]) -> dict[str, np.ndarray]:
  """`make()`, a dict of arrays and numbers, or what it gave when it was last called under this name.

  Args:
    data: see `cache_dir`.
    name: of the file, without suffix; names all that the values depend on.

  Raises:
    UserError: the file is damaged, or cannot be written.
  """
  path = cache_dir(data) / f'{name}.npz'
  try:
    with path.open('rb') as opened, np.load(opened) as file:
      return dict(file)
  except FileNotFoundError:
    pass
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'cached {str(path)!r} is damaged, delete it: {error}') from error
  values = {key: np.asarray(value) for key, value in make().items()}
  with replacing(path) as temporary, temporary.open('wb') as file:
    np.savez(file, **values)
  return values
