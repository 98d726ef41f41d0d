"""Rows of a run: metrics.jsonl, load_history.jsonl, evals.jsonl and TensorBoard events.

A resumed run cuts the files back to the step it resumes from, so that each step stands once. A checkpoint remembers how
many bytes of rows came before it, which are on disk before it is; so rows that were lost later are noticed, and by the
digests in logs.json also rows that were changed.
"""

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from moe.balance import load_history
from moe.errors import UserError
from moe.files import MAX_JSON_BYTES, digests, open_regular, parse_json, step_of, sync_folder
from moe.train.tensorboard import Board

FILES = ('metrics', 'load_history', 'evals')
BLOCK_BYTES = 1 << 16  # of a file that is read from its end


class Logbook:
  """Appends rows to the files of a run directory; every row is on its way to disk when `write` returns."""

  def __init__(self, run_dir: pathlib.Path, resume_step: int, last_step: int, logged: dict | None = None):
    """Opens the files, keeping rows up to and including `resume_step`, but no evaluation of it if it is `last_step`
    or past that: it will be made again.

    Args:
      run_dir: that exists.
      resume_step: step of the checkpoint that the run goes on from; 0 for a new one.
      last_step: the run's last, train.steps.
      logged: what `sync` returned before the checkpoint of resume_step was written, if that is known; rows of it that
        are no longer there are named in `holes`, a line each. `last_steps` has the step of each file's last row.

    Raises:
      UserError: the directory is not writable, or a row near the end of a file is damaged.
    """
    self._path, self.holes = run_dir, []
    self._files: dict[str, BinaryIO] = {}
    self._digests: dict[str, tuple[int, int]] = {}  # bytes and their CRC-32
    self.last_steps: dict[str, int | None] = {}
    try:
      digests.check_logs(run_dir, whole=False)
      for name in FILES:
        path = run_dir / f'{name}.jsonl'
        kept, last = _kept(path, resume_step)
        self.holes += _hole(path, last, kept[0], (logged or {}).get(name))
        if name == 'evals' and resume_step >= last_step:
          kept, last = _kept(path, resume_step - 1)
        self._digests[name], self.last_steps[name] = kept, last
      self._write_digests()  # before rows go, so that they are not missed
      for name, (size, _) in self._digests.items():
        self._files[name] = (run_dir / f'{name}.jsonl').open('ab')
        self._files[name].truncate(size)
      sync_folder(run_dir)
      self._board = Board(run_dir / 'tensorboard', resume_step + 1)
    except OSError as error:
      raise UserError(f'cannot write to {run_dir}: {error.strerror}') from error

  def write(self, name: str, row: dict) -> None:
    """Appends `row` (with its 'step') to `name`.jsonl, and its numbers to TensorBoard. Raises UserError."""
    with self._guarded(name):
      self._append(name, json.dumps(row, allow_nan=False))
      self._board.add(row['step'], dict(numbers(row)))

  def write_loads(self, step: int, load_LE: np.ndarray, bias_LE: np.ndarray | None = None) -> None:
    """Appends a row to load_history.jsonl, with the router bias if it is given. Raises UserError."""
    with self._guarded('load_history'):
      self._append('load_history', load_history.line(step, load_LE, bias_LE))

  def sync(self) -> dict[str, int]:
    """Returns once all rows and their digests are on disk, with the bytes of each file. Raises UserError."""
    for name, file in self._files.items():
      with self._guarded(name):
        file.flush()
        os.fsync(file.fileno())
    self._write_digests()
    return {name: size for name, (size, _) in self._digests.items()}

  def _write_digests(self):
    digests.write_logs(self._path, {f'{name}.jsonl': digest for name, digest in self._digests.items()})

  def close(self) -> None:
    """Closes all files, also those that a full disk does not let end. Raises UserError."""
    with contextlib.ExitStack() as stack:
      stack.callback(self._close_board)
      for name, file in self._files.items():
        stack.enter_context(self._guarded(name))
        stack.callback(file.close)
      self.sync()

  def _close_board(self):
    with self._guarded('tensorboard'):
      self._board.close()

  def _append(self, name, line):
    row, (size, crc) = f'{line}\n'.encode(), self._digests[name]
    self._files[name].write(row)
    self._files[name].flush()
    self._digests[name] = size + len(row), zlib.crc32(row, crc)

  @contextlib.contextmanager
  def _guarded(self, name) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(f'cannot write {name} in {self._path}: {error.strerror}') from error


def numbers(row: dict) -> Iterator[tuple[str, float]]:
  """(TensorBoard's tag, number) of each number in a row.

  Evaluations are tagged by what they are of, as 'sample/val_loss', 'full/val_loss'.
  """
  of = f'{row["set"]}/' if 'set' in row else ''
  for key, value in row.items():
    if isinstance(value, dict):
      yield from ((f'{key}/{name}', number) for name, number in numbers(value))
    elif key != 'step' and isinstance(value, (int, float)):
      yield of + key, value


def _kept(path: pathlib.Path, step: int) -> tuple[tuple[int, int], int | None]:
  """((bytes, CRC-32) of the rows up to `step`, step of the last of them or None); a crash may have left half a line.

  Rows are parsed from the end, no more of them than needed.
  """
  if not path.exists():
    return (0, 0), None
  with open_regular(path) as file:
    for line, end in _lines_from_the_end(file):
      where = f'{path}, the row that ends at byte {end}'
      if line.endswith(b'\n') and (found := step_of(parse_json(line, where), where)) <= step:
        file.seek(0)
        return digests.crc_of(file, end), found
  return (0, 0), None


def _lines_from_the_end(file) -> Iterator[tuple[bytes, int]]:
  """(line, with its end if it has one; the byte after it), last first. Raises UserError if one is too long for JSON."""
  start = end = file.seek(0, os.SEEK_END)
  held = b''  # the file from `start` to `end`
  while end:
    cut = held.rfind(b'\n', 0, len(held) - 1)
    if cut < 0 and start:
      if len(held) > MAX_JSON_BYTES:
        raise UserError(f'{file.name}, the row that ends at byte {end}, is longer than {MAX_JSON_BYTES:,} bytes')
      size = min(max(BLOCK_BYTES, len(held)), start)  # twice as many each time, or a long line takes for ever
      start -= size
      file.seek(start)
      held = file.read(size) + held
      continue
    yield held[cut + 1 :], end
    held, end = held[: cut + 1], end - (len(held) - cut - 1)


def _hole(path: pathlib.Path, last: int | None, found: int, size: int | None) -> list[str]:
  """A line about rows that a checkpoint counted and that are not among the first `found` bytes, or none."""
  if size is None or (found >= size and _is_end(path, size)):
    return []
  ends = 'has no rows' if last is None else f'ends at step {last}'
  return [f'{path.name} {ends}, {found:,} bytes, where there were {size:,}: rows of earlier steps are missing']


def _is_end(path, size) -> bool:
  """Whether a row ends at that byte."""
  if not size:
    return True
  with path.open('rb') as file:
    file.seek(size - 1)
    return file.read(1) == b'\n'
