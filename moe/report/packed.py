"""The results of a sweep in one file, small enough to commit: FILE of a results folder, without sweep.json and runs.

It is an .npz that np.load opens. `about` is UTF-8 JSON: the sweep as in sweep.json, and of each run its config.json,
data.json, evals.jsonl without loads, the sweep's report's averages over all rows of the others, and how many of those
rows are here. Those of all runs stand end to end:

    metrics/KEY                a value of metrics.jsonl of each row that has it; NaN is what was no number
    has/KEY                    which rows have it, where not all do
    history/step               steps of load_history.jsonl, whose biases are left out: no report of a sweep shows them
    history/load, evals/load   counts of each row of load_history.jsonl and evals.jsonl, [L, E] of its run, flattened

The same runs make the same bytes. Nothing in the file is code, zip's CRC-32 shows damage, and a file that would grow
beyond MOST_BYTES is refused before it does.
"""

import io
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from moe.config import from_config_dict
from moe.errors import UserError, short
from moe.files import parse_json, read_bytes, replacing, step_of
from moe.report.run import Run, is_finite
from moe.sweep import manifest

FILE = 'sweep.npz'
MOST_BYTES = 1 << 27  # unpacked; 69 thinned runs of 1,500 steps have 5 MB
HEADER_BYTES = 128  # of an array in an .npz
Piece = TypeVar('Piece', np.ndarray, list[dict[str, Any]])


def write(folder: pathlib.Path, sweep: manifest.Sweep, runs: Mapping[str, Run]) -> None:
  """Writes FILE into a folder, which is made if missing.

  Args:
    runs: by `RunOf.folder`; runs of the sweep that are not here count as not started.

  Raises:
    UserError: too much for one file, or it cannot be written.
  """
  runs = {run.folder: runs[run.folder] for run in sweep.runs if run.folder in runs}
  history = [row for run in runs.values() for row in run.load_history]
  evals = [row for run in runs.values() for row in run.evals]
  about = {'sweep': manifest.describe(sweep), 'runs': {name: _about(run) for name, run in runs.items()}}
  arrays = {
    'about': np.frombuffer(json.dumps(about).encode(), np.uint8),
    **_columns([row for run in runs.values() for row in run.rows]),
    'history/step': np.array([row['step'] for row in history], np.int64),
    'history/load': _flat(history),
    'evals/load': _flat(evals),
  }
  if (size := sum(array.nbytes + HEADER_BYTES for array in arrays.values())) > MOST_BYTES:
    raise UserError(f'{folder / FILE} would unpack to {size:,} bytes, above {MOST_BYTES:,}; keep fewer rows or runs')
  with replacing(folder / FILE) as temporary, temporary.open('wb') as file:
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # ** might hold numpy's own allow_pickle, mypy thinks


def read(folder: pathlib.Path) -> tuple[manifest.Sweep, dict[str, Run]]:
  """The sweep in FILE and its runs by folder, as `write` got them. Raises UserError: no such file, or damaged."""
  path = folder / FILE
  arrays = _arrays(path)
  try:
    about = parse_json(arrays['about'].tobytes(), str(path))
    sweep = manifest.parse(about['sweep'], path)
    tapes = {name: _Tape(_numbers(arrays[name], 'iu')) for name in ('history/step', 'history/load', 'evals/load')}
    rows = _Tape(_rows(arrays))
    runs = {name: _run(folder / name, described, rows, tapes) for name, described in about['runs'].items()}
    rest = {name: len(tape.rest) for name, tape in tapes.items()} | {'metrics': len(rows.rest)}
    if left := [name for name, count in rest.items() if count]:
      raise ValueError(f'{left[0]} has more than all runs together')
  except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
    raise UserError(f'{path} is damaged: {error!r}') from error
  return sweep, runs


class _Tape(Generic[Piece]):
  """A list or array that is read piece by piece from its beginning."""

  def __init__(self, rest: Piece):
    self.rest: Piece = rest

  def take(self, count: int) -> Piece:
    if type(count) is not int or not 0 <= count <= len(self.rest):
      raise ValueError(f'{str(count)[:40]} rows cannot be')
    taken, self.rest = self.rest[:count], self.rest[count:]
    return taken


def _about(run: Run) -> dict[str, Any]:
  evals = [{key: value for key, value in row.items() if key != 'load_LE'} for row in run.evals]
  counts = {'rows': len(run.rows), 'history': len(run.load_history)}
  return {'info': run.info, 'data': run.data, 'evals': evals, **counts, 'averages': run.averages}


def _run(
  path: pathlib.Path,
  described: dict[str, Any],
  row_tape: _Tape[list[dict[str, Any]]],
  tapes: dict[str, _Tape[np.ndarray]],
) -> Run:
  """A run of its description and the next piece of every tape. Raises UserError and what else `read` catches."""
  rows, evals = row_tape.take(described['rows']), described['evals']
  data = {key: value for key, value in described['data'].items() if isinstance(value, str | int | float)}
  history: list[dict[str, Any]] = []
  averages = described.get('averages', {})  # missing in files of older versions: reports average over the rows there
  if not all(value is None or is_finite(value) for value in averages.values()):
    raise ValueError(f'averages {short(averages)}')
  run = Run(path, described['info'], data, rows, history, evals, None, averages=averages)
  where = f'{path.parent / FILE}, run {path.name},'
  try:
    from_config_dict(run.info['config'])
  except UserError as error:
    raise UserError(f'{where} is damaged: {error}') from error
  if not rows or not all('loss' in row for row in rows):
    raise UserError(f'{where} has no rows, or one without a loss')
  history.extend({'step': int(step)} for step in tapes['history/step'].take(described['history']))
  for kind, found in (('history', history), ('evals', evals)):
    layers, num_experts = run.load_shape
    loads = tapes[f'{kind}/load'].take(len(found) * layers * num_experts)
    for row, load_LE in zip(found, loads.reshape(len(found), layers, num_experts), strict=True):
      row['load_LE'] = load_LE
  for found in (rows, history, evals):
    steps = [step_of(row, where) for row in found]
    if sorted(set(steps)) != steps:
      raise UserError(f'{where} has steps out of order')
  return run


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  data = io.BytesIO(read_bytes(path, MOST_BYTES))
  try:
    with zipfile.ZipFile(data) as file:
      size = sum(member.file_size for member in file.infolist())  # no more is unpacked, whatever is behind it
    if size > MOST_BYTES:
      raise ValueError(f'it would unpack to {size:,} bytes, above {MOST_BYTES:,}')
    with np.load(data, allow_pickle=False) as file:
      arrays = dict(file)
    for name, array in arrays.items():  # values of no bytes could be without number
      if array.ndim != 1 or array.dtype.kind not in 'biuf':
        raise ValueError(f'{name} is an array of {array.dtype} {array.shape}')
  except Exception as error:  # damaged zip archives raise nearly anything
    raise UserError(f'{path} is damaged: {error}') from error
  return arrays


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """'metrics/KEY' for every key of the rows, and 'has/KEY' of those that not all rows have."""
  arrays = {}
  for key in dict.fromkeys(key for row in rows for key in row):
    arrays[f'metrics/{key}'] = _column([row[key] for row in rows if key in row])
    has = np.array([key in row for row in rows])
    arrays |= {} if has.all() else {f'has/{key}': has}
  return arrays


def _column(values: list[Any]) -> np.ndarray:
  """Integers, or floats: of 32 bits where these hold the first six digits of each and there are no more."""
  if all(type(value) is int and abs(value) < 1 << 53 for value in values):
    return np.array(values, np.int64)
  is_number = lambda value: isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 53)
  column = np.array([value if is_number(value) else np.nan for value in values], np.float64)
  with np.errstate(over='ignore'):
    short = column.astype(np.float32)
  return short if np.array_equal(_six_digits(short), column, equal_nan=True) else column


def _six_digits(column: np.ndarray) -> np.ndarray:
  return np.array([float(f'{value:.6g}') for value in column.tolist()])


def _rows(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
  """The rows of all runs, from the arrays of `_columns`."""
  rows: list[dict[str, Any]] = [{} for _ in arrays['metrics/step']]
  for name, array in arrays.items():
    kind, _, key = name.partition('/')
    if kind == 'metrics':
      values = _six_digits(array) if array.dtype == np.float32 else array
      has = arrays.get(f'has/{key}', np.ones(len(rows), bool))
      having = [row for row, there in zip(rows, has.tolist(), strict=True) if there]
      for row, value in zip(having, _numbers(values, 'iuf').tolist(), strict=True):
        row[key] = value
  return rows


def _flat(rows: list[dict[str, Any]]) -> np.ndarray:
  """Counts of all rows in the smallest integers that hold them."""
  loads = np.concatenate([np.array([], np.int64), *(row['load_LE'].ravel() for row in rows)])
  return loads.astype(np.min_scalar_type(loads.max(initial=0)))


def _numbers(array: np.ndarray, kinds: str) -> np.ndarray:
  """int64 or float64 of a list of numbers; counts and steps, of kinds 'iu', are 0 or more."""
  if array.dtype.kind not in kinds or array.dtype == np.uint64:
    raise ValueError(f'an array of {array.dtype}')
  if kinds == 'iu' and array.min(initial=0) < 0:
    raise ValueError('negative counts')
  return array.astype(np.float64 if array.dtype.kind == 'f' else np.int64)
