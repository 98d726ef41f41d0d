"""Rows of a run: metrics.jsonl, load_history.jsonl, evals.jsonl and TensorBoard events.

A resumed run cuts the files back to the step it resumes from, so that each step stands once.
"""

import json
import os
import pathlib

import tensorboardX

from moe.errors import UserError

FILES = ('metrics', 'load_history', 'evals')


class Logbook:
  """Appends rows to the files of a run directory; every row is on its way to disk when `write` returns."""

  def __init__(self, run_dir: pathlib.Path, resume_step: int, last_step: int):
    """Opens the files, keeping rows up to and including `resume_step`; `last_step` will be evaluated again.

    Raises:
      UserError: the directory is not writable.
    """
    self._path = run_dir
    try:
      for name in FILES:
        _cut_back(run_dir / f'{name}.jsonl', resume_step if name != 'evals' else min(resume_step, last_step - 1))
      self._files = {name: (run_dir / f'{name}.jsonl').open('a', encoding='utf-8') for name in FILES}
      self._board = tensorboardX.SummaryWriter(str(run_dir / 'tensorboard'), purge_step=resume_step + 1, flush_secs=30)
    except OSError as error:
      raise UserError(f'cannot write to {run_dir}: {error.strerror}') from error

  def write(self, name: str, row: dict) -> None:
    """Appends `row` (with its 'step') to `name`.jsonl, and its numbers to TensorBoard. Raises UserError."""
    try:
      self._files[name].write(json.dumps(row, allow_nan=False) + '\n')
      self._files[name].flush()
      for tag, value in _numbers(row):
        self._board.add_scalar(tag, value, row['step'])
    except OSError as error:
      raise UserError(f'cannot write to {self._path / name}.jsonl: {error.strerror}') from error

  def close(self) -> None:
    for file in self._files.values():
      file.close()
    self._board.close()


def _numbers(row):
  """(TensorBoard's tag, number); evaluations are tagged by what they are of, as 'sample/val_loss', 'full/val_loss'."""
  of = f'{row["set"]}/' if 'set' in row else ''
  for key, value in row.items():
    if isinstance(value, dict):
      yield from ((f'{key}/{name}', number) for name, number in value.items())
    elif key != 'step' and isinstance(value, (int, float)):
      yield of + key, value


def _cut_back(path: pathlib.Path, step: int):
  """Truncates a .jsonl file before its first row past `step` or, after a crash, its incomplete last line."""
  if not path.exists():
    return
  keep = 0
  with open(path, 'rb') as file:
    for line in file:
      if not line.endswith(b'\n') or json.loads(line)['step'] > step:
        break
      keep += len(line)
  if keep < path.stat().st_size:
    os.truncate(path, keep)
