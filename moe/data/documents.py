"""Documents of one file, in memory in proportion to it: text, lines of JSON (also gzipped) or a column of Parquet."""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe.errors import UserError
from moe.files import parse_json, read_bytes, regular

SUFFIXES = ('.txt', '.md', '.py', '.jsonl', '.jsonl.gz', '.parquet')
MAX_FILE_BYTES = 1 << 34  # of one file; a corpus is held in memory
# Compressed text may expand to this many times its file's size, or to so many bytes, whichever is more: text shrinks to
# a third, repetitive records to a thirtieth, and what shrinks to less is made to fill the memory.
MAX_EXPANSION, MIN_EXPANDED_BYTES = 100, 1 << 26
CHUNK_BYTES = 1 << 20  # decompressed at once
PARQUET_ROWS = 16  # decoded at once: each may be as long as all the file


class Document(NamedTuple):
  """One text; tokens of different documents never see each other."""

  name: str  # unique in its corpus
  text: bytes  # UTF-8, not empty


def suffix(path: str | os.PathLike) -> str:
  """The one of SUFFIXES that `path` has, or ''."""
  name = os.path.basename(path).lower()
  return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), '')


def read_documents(path: Path, name: str, text_key: str) -> Iterator[Document | None]:
  """Documents of a file with one of SUFFIXES: one that is called `name`, or 'name#index' of each record, from 0.

  Records with empty text are passed over; None stands for each record whose text is null.

  Args:
    text_key: field or column of the text.

  Raises:
    UserError: naming the file (and line or row) that is unreadable, binary, malformed, or expands too much.
  """
  if suffix(path) == '.parquet':
    yield from _parquet(path, name, text_key)
    return
  text = _gunzip(path) if suffix(path) == '.jsonl.gz' else read_bytes(path, MAX_FILE_BYTES)
  problem = text_problem(text)
  if problem:
    raise UserError(f'file {str(path)!r} is not UTF-8 text: {problem}')
  if suffix(path) in ('.jsonl', '.jsonl.gz'):
    yield from _jsonl(path, name, text, text_key)
  elif text:
    yield Document(name, text)


def text_problem(text: bytes) -> str | None:
  """Why `text` is not UTF-8 text, or None if it is."""
  if b'\0' in text:
    return f'NUL byte at offset {text.index(0)}'
  try:
    text.decode('utf-8')
  except UnicodeDecodeError as error:
    return f'{error.reason} at offset {error.start}'
  return None


def _check_expanded(path, file_bytes, expanded_bytes):
  limit = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * file_bytes)
  if expanded_bytes > limit:
    raise UserError(f'file {str(path)!r} of {file_bytes:,} bytes expands to more than the {limit:,} allowed')


def _gunzip(path: Path) -> bytes:
  packed = read_bytes(path, MAX_FILE_BYTES)
  chunks, size = [], 0
  try:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
      while chunk := file.read(CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        _check_expanded(path, len(packed), size)
  except (EOFError, OSError, zlib.error) as error:
    raise UserError(f'file {str(path)!r} is not a complete gzip file: {error}') from error
  return b''.join(chunks)


def _jsonl(path: Path, name: str, lines: bytes, text_key: str) -> Iterator[Document | None]:
  index = 0
  for number, line in enumerate(io.BytesIO(lines.removeprefix(codecs.BOM_UTF8)), 1):
    if line.strip():
      where = f'{path}:{number}'
      record = parse_json(line, where)
      if text_key not in record:
        raise UserError(f'{where} has no field data.text_key = {text_key!r}; each line must have it')
      yield from _record(record[text_key], where, text_key, f'{name}#{index}')
      index += 1


def _record(text, where: str, text_key: str, name: str) -> Iterator[Document | None]:
  """The document of one record; none if its text is empty."""
  if text is None:
    yield None
  elif not isinstance(text, str):
    raise UserError(f'{where}: field {text_key!r} has type {type(text).__name__}; it must be a string')
  elif text:
    try:
      yield Document(name, text.encode('utf-8'))
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON
      raise UserError(f'{where}: field {text_key!r} cannot be written as UTF-8: {error.reason}') from error


def _parquet(path: Path, name: str, text_key: str) -> Iterator[Document | None]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    message = f'reading {str(path)!r} needs pyarrow; run: pip install "moe-lossfree[parquet]"'
    raise UserError(message) from error
  file_bytes, expanded_bytes = regular(path, MAX_FILE_BYTES).st_size, 0
  try:
    metadata = pyarrow.parquet.read_metadata(path)
    columns = metadata.schema.to_arrow_schema().names
    if text_key not in columns:
      raise UserError(f'{str(path)!r} has no column data.text_key = {text_key!r}; its columns are {columns[:9]}')
    _check_expanded(path, file_bytes, max(metadata.num_rows, _uncompressed(metadata, text_key)))
    with pyarrow.parquet.ParquetFile(path) as file:
      rows = (row for batch in file.iter_batches(PARQUET_ROWS, columns=[text_key]) for row in batch.column(0))
      for index, row in enumerate(rows):
        for document in _record(row.as_py(), f'{path}#{index}', text_key, f'{name}#{index}'):
          expanded_bytes += len(document.text) if document else 0
          _check_expanded(path, file_bytes, expanded_bytes)
          yield document
  except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
    raise UserError(f'cannot read parquet file {str(path)!r}: {" ".join(str(error).split())}'[:300]) from error


def _uncompressed(metadata, column: str) -> int:
  """Bytes of a column's pages, decompressed but still encoded."""
  groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
  chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
  return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split('.')[0] == column)
