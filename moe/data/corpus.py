"""Reads text files into documents and splits them into training and validation documents."""

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.config import DataConfig
from moe.data.documents import Document, read_documents, text_problem
from moe.data.find import find, walk
from moe.errors import UserError
from moe.files import read_bytes

NEAR_BYTES = 1024  # a lone document is split at a newline if there is one this near
PACKAGES = ('site-packages', 'dist-packages')  # folders of installed packages below the standard library


@dataclass(frozen=True)
class Corpus:
  """Training documents, sorted by name, and validation documents, in the order of the sha256 of their names.

  A long document may be most of the validation text, wherever it stands: a sample is spread over all of the text.
  """

  train: list[Document]
  val: list[Document]
  name: str  # for people: 'Python 3.11 standard library', or the paths
  num_nulls: int = 0  # records that were left out since their text is null

  @property
  def train_bytes(self) -> int:
    return sum(len(document.text) for document in self.train)

  @property
  def val_bytes(self) -> int:
    return sum(len(document.text) for document in self.val)

  @functools.cached_property
  def digest(self) -> str:
    """sha256 (hex) of all names and texts and of the split; equal digests mean equal corpora."""
    sha = hashlib.sha256()
    for documents in (self.train, self.val):
      sha.update(b'%d\n' % len(documents))
      for name, text in documents:
        for part in (os.fsencode(name), text):
          sha.update(b'%d\n' % len(part))  # lengths, so that no two corpora run together to the same bytes
          sha.update(part)
    return sha.hexdigest()


def load_corpus(data: DataConfig, leave_out: Iterable[Path] = ()) -> Corpus:
  """Reads the corpus that `data.paths` names and splits off `data.val_fraction` of it.

  '' is the running Python's standard library: every *.py file outside site-packages, less those that are empty, not
  UTF-8 or binary (test data of the interpreter). Otherwise comma-separated files, folders (searched recursively for
  SUFFIXES) and globs (files with one of SUFFIXES among the matches; `**` is recursive); `moe.data.find` says which of
  the files that they lead to are left out. Empty files found in folders or by globs, and records whose text is empty
  or null, are skipped; anything unreadable is an error. A file is named by its path below the deepest folder that
  holds all files, so a corpus may move; a record is named 'file#index' from 0.

  Whole documents are split: in order of the sha256 of their names, the first max(1, round(val_fraction * n)) are the
  validation documents. A lone document is cut instead: its last val_fraction of bytes, from a newline within 1024
  bytes if there is one, and always from a character's first byte, becomes the validation document 'name#end'.

  Args:
    leave_out: folders that hold no text, wherever data.paths leads: that of the run itself.

  Raises:
    UserError: naming the path (and line or row) that is missing, unsupported, empty, binary or malformed.
  """
  found: list[Document | None]
  if data.paths:
    name, found = data.paths, list(_named_files(data, leave_out))
  else:
    name, found = f'Python {sys.version_info.major}.{sys.version_info.minor} standard library', list(_stdlib())
  documents = [document for document in found if document is not None]
  if not documents:
    raise UserError(f'no text in {name!r}: every file or record of data.paths is empty')
  split = _split_text if len(documents) == 1 else _split_documents
  return Corpus(*split(documents, data.val_fraction), name, len(found) - len(documents))


def _split_documents(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
  by_hash = sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
  num_val = min(max(1, round(fraction * len(documents))), len(documents) - 1)
  return sorted(by_hash[num_val:]), by_hash[:num_val]


def _split_text(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
  ((name, text),) = documents
  cut = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
  newline = text.rfind(b'\n', max(0, cut - NEAR_BYTES), cut)
  cut = newline + 1 if newline >= 0 else cut
  while cut > 0 and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
    cut -= 1
  if cut <= 0:
    raise UserError(f'the only document {name!r} has {len(text)} bytes, too few to split off a validation part')
  return [Document(name, text[:cut])], [Document(f'{name}#end', text[cut:])]


def _stdlib() -> Iterator[Document]:
  root = sysconfig.get_path('stdlib')
  packages = frozenset(os.path.realpath(os.path.join(root, name)) for name in PACKAGES)
  paths = sorted(Path(folder, name) for folder, names in walk(root, packages) for name in names)
  for path in paths:
    relative = path.relative_to(root)
    if path.suffix == '.py' and not {*PACKAGES, '__pycache__'} & set(relative.parts):
      text = read_bytes(path)
      if text and text_problem(text) is None:
        yield Document(relative.as_posix(), text)


def _named_files(data: DataConfig, leave_out: Iterable[Path]) -> Iterator[Document | None]:
  files = find(data.paths, leave_out)
  root = os.path.commonpath([os.path.dirname(path) for path, _ in files])
  for path, explicit in files:
    if explicit and not os.path.getsize(path):
      raise UserError(f'file {path!r} of data.paths is empty')
    yield from read_documents(Path(path), Path(path).relative_to(root).as_posix(), data.text_key)
