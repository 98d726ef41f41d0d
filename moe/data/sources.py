"""Where documents are from, as their names tell it: the kinds of text that a validation set is made of."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe.data.documents import suffix

MOST = 12  # sources; of more, the smallest are one
OTHERS = 'all others'


class Sources(NamedTuple):
  """by: what tells them apart, 'suffix', 'folder' or 'file'; '' where all text is of one source. names: the largest
  first, OTHERS last. of_document: int64 [documents], a place in `names`."""

  by: str
  names: list[str]
  of_document: np.ndarray


def group(names: Sequence[str], sizes: np.ndarray) -> Sources:
  """Sorts documents by the first of suffix, top folder and file that tells any two of them apart.

  Args:
    names: as of `documents.Document`.
    sizes: how much text each is, int64 [documents].
  """
  for by, key in KEYS.items():
    keys = [key(_file(name)) for name in names]
    if len(set(keys)) > 1:
      return Sources(by, *_numbered(keys, sizes))
  return Sources('', ['all text'], np.zeros(len(sizes), np.int64))


def _suffix(file):
  return suffix(file) or os.path.splitext(file)[1]


def _top_folder(file):
  return f'{file.split("/")[0]}/' if '/' in file else './'


KEYS: dict[str, Callable[[str], str]] = {'suffix': _suffix, 'folder': _top_folder, 'file': lambda file: file}


def _file(name):
  """Of a record 'file#index' and of the end of a lone document 'file#end', the file."""
  file, mark, place = name.rpartition('#')
  return file if mark and (place.isdigit() or place == 'end') else name


def _numbered(keys, sizes):
  total = dict.fromkeys(sorted(set(keys)), 0)
  for key, size in zip(keys, sizes.tolist(), strict=True):
    total[key] += size
  largest = sorted(total, key=total.__getitem__, reverse=True)
  kept = largest if len(largest) <= MOST else largest[: MOST - 1]
  place = {key: i for i, key in enumerate(kept)}
  # Names of files may be no text at all, which neither JSON nor a page can hold.
  shown = [key.encode('utf-8', 'backslashreplace').decode() for key in kept]
  others = [OTHERS] if len(kept) < len(largest) else []
  return shown + others, np.array([place.get(key, len(kept)) for key in keys], np.int64)
