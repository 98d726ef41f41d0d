"""Reads text files into documents and splits them into training and validation documents."""

import functools
import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe.config import DataConfig
from moe.errors import UserError

SUFFIXES = ('.txt', '.md', '.py', '.jsonl', '.jsonl.gz', '.parquet')
NEAR_BYTES = 1024  # a lone document is split at a newline if there is one this near


class Document(NamedTuple):
  """One text; tokens of different documents never see each other."""

  name: str  # unique in its corpus
  text: bytes  # UTF-8, not empty


@dataclass(frozen=True)
class Corpus:
  """Training documents, sorted by name, and validation documents, in an order that has nothing to do with their names.

  So the first few validation documents are a sample of all, and neighbours in a folder do not come together.
  """

  train: list[Document]
  val: list[Document]
  name: str  # for people: 'Python 3.11 standard library', or the paths

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


def load_corpus(data: DataConfig) -> Corpus:
  """Reads the corpus that `data.paths` names and splits off `data.val_fraction` of it.

  '' is the running Python's standard library: every *.py file outside site-packages, less those that are empty, not
  UTF-8 or binary (test data of the interpreter). Otherwise comma-separated files, folders (searched recursively for
  SUFFIXES) and globs (files with one of SUFFIXES among the matches; `**` is recursive). Empty files found in folders
  or by globs, and records with empty text, are skipped; anything unreadable is an error. A file is named by its path
  below the deepest folder that holds all files, so a corpus may move; a record is named 'file#index' from 0.

  Whole documents are split: in order of the sha256 of their names, the first max(1, round(val_fraction * n)) are the
  validation documents. A lone document is cut instead: its last val_fraction of bytes, from a newline within 1024
  bytes if there is one, and always from a character's first byte, becomes the validation document 'name#end'.

  Raises:
    UserError: naming the path (and line or row) that is missing, unsupported, empty, binary or malformed.
  """
  if data.paths:
    name, documents = data.paths, _named_files(data)
  else:
    name, documents = f'Python {sys.version_info.major}.{sys.version_info.minor} standard library', _stdlib()
  documents = list(documents)
  if not documents:
    raise UserError(f'no text in {name!r}: every file or record of data.paths is empty')
  split = _split_text if len(documents) == 1 else _split_documents
  return Corpus(*split(documents, data.val_fraction), name)


def _split_documents(documents: list[Document], fraction: float):
  by_hash = sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
  num_val = min(max(1, round(fraction * len(documents))), len(documents) - 1)
  return sorted(by_hash[num_val:]), by_hash[:num_val]


def _split_text(documents: list[Document], fraction: float):
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
  root = Path(sysconfig.get_path('stdlib'))
  for path in _walk(root):
    relative = path.relative_to(root)
    if path.suffix != '.py' or {'site-packages', 'dist-packages', '__pycache__'} & set(relative.parts):
      continue
    text = _read(path)
    if text and text_problem(text) is None:
      yield Document(relative.as_posix(), text)


def _named_files(data: DataConfig) -> Iterator[Document]:
  paths = {}  # absolute path -> whether named explicitly, each file once however often it is named
  for entry in data.paths.split(','):
    for path, explicit in _expand(entry.strip(), data.paths):
      path = os.path.abspath(path)
      paths[path] = paths.get(path, False) or explicit
  root = os.path.commonpath([os.path.dirname(path) for path in paths])
  for path, explicit in sorted(paths.items()):
    yield from _documents(Path(path), Path(path).relative_to(root).as_posix(), explicit, data.text_key)


def _expand(entry: str, paths: str) -> list[tuple[Path, bool]]:
  """Files behind one entry of data.paths, each with whether it was named itself."""
  if not entry:
    raise UserError(f'config data.paths = {paths!r} has an empty entry between its commas; remove it')
  path = Path(entry).expanduser()
  supported = 'the supported suffixes are ' + ' '.join(SUFFIXES)
  if os.path.isdir(path):  # unlike Path.is_dir, False below a folder that may not be entered
    found = [file for file in _walk(path) if _suffix(file)]
    if not found:
      raise UserError(f'folder {entry!r} of data.paths holds no supported file; {supported}')
    return [(file, False) for file in found]
  if os.path.exists(path):
    if not _suffix(path):
      raise UserError(f'file {entry!r} of data.paths has an unsupported suffix; {supported}')
    return [(path, True)]
  if not glob.has_magic(entry):
    raise UserError(f'path {entry!r} of data.paths does not exist or cannot be reached; give files, folders or globs')
  found = [Path(match) for match in glob.glob(str(path), recursive=True)]
  found = [file for file in found if _suffix(file) and not file.is_dir()]
  if not found:
    raise UserError(f'pattern {entry!r} of data.paths matches no supported file; {supported}')
  return [(file, False) for file in found]


def _walk(folder: Path) -> list[Path]:
  def fail(error: OSError):  # os.walk would pass over what it cannot list
    raise UserError(f'cannot list folder {error.filename!r}: {error.strerror}')

  return sorted(Path(top, file) for top, _, files in os.walk(folder, onerror=fail) for file in files)


def _suffix(path: Path) -> str:
  """The one of SUFFIXES that `path` has, or ''."""
  return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), '')


def _documents(path: Path, name: str, explicit: bool, text_key: str) -> Iterator[Document]:
  suffix = _suffix(path)
  if suffix == '.parquet':
    yield from _parquet(path, name, text_key)
    return
  text = _gunzip(path) if suffix == '.jsonl.gz' else _read(path)
  if explicit and not text:
    raise UserError(f'file {str(path)!r} of data.paths is empty')
  problem = text_problem(text)
  if problem:
    raise UserError(f'file {str(path)!r} is not UTF-8 text: {problem}')
  if suffix in ('.jsonl', '.jsonl.gz'):
    yield from _jsonl(path, name, text, text_key)
  elif text:
    yield Document(name, text)


def _read(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {str(path)!r}: {error.strerror}') from error


def _gunzip(path: Path) -> bytes:
  packed = _read(path)
  if not packed:
    return b''
  try:
    return gzip.decompress(packed)
  except (EOFError, OSError, zlib.error) as error:
    raise UserError(f'file {str(path)!r} is not a complete gzip file: {error}') from error


def text_problem(text: bytes) -> str | None:
  """Why `text` is not UTF-8 text, or None if it is."""
  if b'\0' in text:
    return f'NUL byte at offset {text.index(0)}'
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    return f'{error.reason} at offset {error.start}'
  return None


def _jsonl(path: Path, name: str, lines: bytes, text_key: str) -> Iterator[Document]:
  index = 0
  for number, line in enumerate(lines.split(b'\n'), 1):
    if line.strip():
      text = _record_text(line, f'{path}:{number}', text_key)
      if text:
        yield Document(f'{name}#{index}', text)
      index += 1


def _record_text(line: bytes, where: str, text_key: str) -> bytes:
  try:
    record = json.loads(line.decode('utf-8'))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where} is not valid JSON: {error}') from error
  if not isinstance(record, dict) or text_key not in record:
    raise UserError(f'{where} has no field data.text_key = {text_key!r}; each line must be an object with that field')
  return _encode(record[text_key], where, text_key)


def _encode(text, where: str, text_key: str) -> bytes:
  if not isinstance(text, str):
    raise UserError(f'{where}: field {text_key!r} has type {type(text).__name__}; it must be a string')
  try:
    return text.encode('utf-8')
  except UnicodeEncodeError as error:  # "\ud800" is valid JSON
    raise UserError(f'{where}: field {text_key!r} cannot be written as UTF-8: {error.reason}') from error


def _parquet(path: Path, name: str, text_key: str) -> Iterator[Document]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    message = f'reading {str(path)!r} needs pyarrow; run: pip install "moe-lossfree[parquet]"'
    raise UserError(message) from error
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      columns = file.schema_arrow.names
      if text_key not in columns:
        raise UserError(f'{str(path)!r} has no column data.text_key = {text_key!r}; its columns are {columns}')
      index = 0
      for batch in file.iter_batches(columns=[text_key]):
        for value in batch.column(0).to_pylist():
          text = _encode(value, f'{path}#{index}', text_key)
          if text:
            yield Document(f'{name}#{index}', text)
          index += 1
  except (OSError, ValueError, pyarrow.ArrowException) as error:
    raise UserError(f'cannot read parquet file {str(path)!r}: {" ".join(str(error).split())}') from error
