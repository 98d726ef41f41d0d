"""load_history.jsonl: how many tokens each expert got in logged training steps, as `load_LE`.

A row is {"step": 12, "load_LE": "<base64 of zlib of little-endian int32, [L, E]>"}, which at DeepSeek-V3's size takes a
third of the JSON numbers that older runs have in its place. A few rows also have the router bias after the step, as
"bias_LE", float32 in the same manner. Rows are found without being parsed, and decoded one by one as they are looked
at, since all of them may not fit in memory.
"""

import base64
import binascii
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import UserError
from moe.files import open_regular, out_of_order, parse_json, step_of

FILE = 'load_history.jsonl'
MOST_ROWS = 2000  # of a run that does not say how often
_STEP = re.compile(rb'\{"step": ?(\d{1,15}),')  # as our rows begin


def rows_every(log_every: int, steps: int, most: int = MOST_ROWS) -> int:
  """Steps per row where a run does not say: its log_every, or the least multiple that makes at most `most` rows."""
  return log_every * -(-steps // (log_every * most))


def encode(load_LE: np.ndarray) -> str:
  """Counts below 2^31, for a row."""
  return _packed(load_LE, '<i4')


def _packed(array, dtype):
  return base64.b64encode(zlib.compress(np.asarray(array, dtype).tobytes())).decode()


def decode(value: Any, shape: tuple[int, int], where: str) -> np.ndarray:
  """int64 [L, E] of a row's 'load_LE', encoded or a list. Raises UserError, which begins with `where`."""
  if isinstance(value, str):
    return _unpacked(value, shape, where)
  try:
    load_LE = np.array(value)
  except ValueError as error:  # rows of different lengths
    raise UserError(f'{where}: load_LE must be counts, layers by experts') from error
  if load_LE.dtype.kind != 'i' or load_LE.min(initial=0) < 0:
    raise UserError(f'{where}: load_LE must be counts, layers by experts')
  if load_LE.shape != shape:
    raise UserError(f'{where}: load_LE has shape {load_LE.shape}, but by config.json it is {shape}')
  return load_LE.astype(np.int64)


def _unpacked(text, shape, where):
  load_LE = _numbers(text, '<i4', shape, where, 'load_LE')
  if load_LE is None or load_LE.min(initial=0) < 0:
    raise UserError(f'{where}: load_LE does not hold counts of shape {shape}, as by config.json')
  return load_LE.astype(np.int64)


def decode_bias(value: Any, shape: tuple[int, int], where: str) -> np.ndarray | None:
  """float64 [L, E] of a row's 'bias_LE'; None where there is none. Raises UserError, which begins with `where`."""
  if value is None:
    return None
  bias_LE = _numbers(value if isinstance(value, str) else '', '<f4', shape, where, 'bias_LE')
  if bias_LE is None or not np.isfinite(bias_LE).all():
    raise UserError(f'{where}: bias_LE does not hold finite numbers of shape {shape}, as by config.json')
  return bias_LE.astype(np.float64)


def _numbers(text, dtype, shape, where, name):
  """An array of 4-byte numbers as `_packed` wrote it; None if it has another size."""
  size = 4 * shape[0] * shape[1]
  try:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)
  except (binascii.Error, ValueError, zlib.error) as error:
    raise UserError(f'{where}: {name} is damaged: {error}') from error
  return np.frombuffer(data, dtype).reshape(shape) if len(data) == size and unpacker.eof else None


class LoadHistory(Sequence):
  """Rows {'step', 'load_LE': int64 [L, E], 'bias_LE': float64 [L, E] or None} in ascending order of their steps; a
  slice is a list of rows."""

  def __init__(self, path: Path, shape: tuple[int, int], again: bool = True):
    """Finds the rows of a file that may be missing. A last line without an end is left out.

    Args:
      shape: (L, E).
      again: as `files.read_rows`.

    Raises:
      UserError: the file cannot be read, or a row is no JSON object with a step, or out of order.
    """
    self._path, self._shape = path, shape
    # (step, line, first byte, bytes), whether there is a bias
    self._places: list[tuple[tuple[int, int, int, int], bool]] = []
    if os.path.lexists(path):
      self._find(again)

  def _find(self, again):
    start = 0
    with open_regular(self._path) as file:
      for number, line in enumerate(file, 1):
        if line.endswith(b'\n'):
          found, where = _STEP.match(line), f'{self._path} line {number}'
          step = int(found[1]) if found else step_of(parse_json(line, where), where)
          while self._places and self._places[-1][0][0] >= step:
            if not again:
              raise out_of_order(where, step)
            self._places.pop()
          self._places.append(((step, number, start, len(line)), b'"bias_LE":' in line))
          start += len(line)

  @property
  def steps(self) -> list[int]:
    return [place[0] for place, _ in self._places]

  @property
  def with_bias(self) -> list[int]:
    """Places of the rows that have a bias."""
    return [i for i, (_, has_bias) in enumerate(self._places) if has_bias]

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self._row(*place) for place, _ in self._places[index]]
    return self._row(*self._places[index][0])

  def _row(self, step, number, start, size) -> dict[str, Any]:
    where = f'{self._path} line {number}'
    with open_regular(self._path) as file:
      file.seek(start)
      row = parse_json(file.read(size), where)
    load_LE, bias_LE = row.get('load_LE'), row.get('bias_LE')
    loads = {'step': step, 'load_LE': decode(load_LE, self._shape, where)}
    return loads | {'bias_LE': decode_bias(bias_LE, self._shape, where)}


def line(step: int, load_LE: np.ndarray, bias_LE: np.ndarray | None = None) -> str:
  """A row as it stands in the file."""
  bias = {} if bias_LE is None else {'bias_LE': _packed(bias_LE, '<f4')}
  return json.dumps({'step': step, 'load_LE': encode(load_LE)} | bias)
