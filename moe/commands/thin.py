"""Copies the results of a sweep, or adds them to such a copy, small enough to be committed: some rows of the logs.

moe thin runs/balance experiments/results/balance

Takes what reports need of every finished run: config.json, data.json, evals.jsonl, summary.json, and of metrics.jsonl
and load_history.jsonl the first row, every Nth step's and the last, numbers to six digits. What reports average over
the last rows then differs slightly. The copy is a results folder like any: moe report makes its report,
moe ablate adds runs.
"""

import json
import pathlib

from absl import flags

from moe.balance import load_history
from moe.errors import UserError
from moe.files import write_atomically, write_json
from moe.files.paths import local_path
from moe.report.run import load_run, summarize
from moe.sweep import jobs, manifest

EVERY = flags.DEFINE_integer('every', 10, 'Steps between rows of metrics.jsonl.', lower_bound=1)
LOADS_EVERY = flags.DEFINE_integer('loads_every', 50, 'Steps between rows of load_history.jsonl.', lower_bound=1)


def main(argv):
  if len(argv) != 3:
    raise UserError('usage: moe thin SWEEP OUT')
  source, out = (local_path(arg, name) for arg, name in zip(argv[1:], ('SWEEP', 'OUT'), strict=True))
  if source.resolve() == out.resolve():
    raise UserError(f'{out} is the sweep itself; choose another folder for the copy')
  sweep = manifest.read(source)
  finished = [run.folder for run in sweep.runs if jobs.is_finished(source / run.folder)]
  if not finished:
    raise UserError(f'{source} has no finished run')
  manifest.open_folder(out, sweep)  # refuses results of another sweep, and other settings
  for folder in finished:
    _copy(source / folder, out / folder)
  size = sum(file.stat().st_size for file in out.rglob('*') if file.is_file())
  print(f'{out}: {len(finished)} runs copied, {size / 1e6:.1f} MB in all')


def _copy(source: pathlib.Path, out: pathlib.Path):
  run = load_run(source)
  public = lambda fields: {key: value for key, value in fields.items() if key != 'command'}  # it has a machine's paths
  info = public(run.info) | {'starts': [public(start) for start in run.starts]}
  write_json(out / 'config.json', info, indent=1)
  for name in ('data.json', 'evals.jsonl'):
    try:
      write_atomically(out / name, (source / name).read_text('utf-8'))
    except OSError as error:
      raise UserError(f'cannot read {source / name}: {error.strerror}') from error
  logs = ('metrics.jsonl', run.rows, EVERY.value), ('load_history.jsonl', run.load_history, LOADS_EVERY.value)
  for name, rows, every in logs:
    kept = [row for i, row in enumerate(rows) if i in (0, len(rows) - 1) or row['step'] % every == 0]
    write_atomically(out / name, ''.join(json.dumps(_short(row), separators=(',', ':')) + '\n' for row in kept))
  write_json(out / 'summary.json', summarize(run), indent=1)  # last: it says that all is here


def _short(row: dict) -> dict:
  """The row for JSON: floats to six digits, loads encoded."""
  short = lambda value: float(f'{value:.6g}') if isinstance(value, float) else value
  return {key: load_history.encode(value) if key == 'load_LE' else short(value) for key, value in row.items()}
