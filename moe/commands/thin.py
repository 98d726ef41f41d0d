"""Packs the results of a sweep, or adds them to what was packed, small enough to be committed: some rows of the logs.

moe thin runs/balance experiments/results/balance

Takes what the report needs of every finished run into one file, OUT/sweep.npz: config.json, data.json, evals.jsonl, and
of metrics.jsonl and load_history.jsonl the first row, every Nth step's and the last, numbers to six digits. Speeds and
the last rows' means are kept as they are over all rows: moe report OUT has the tables of the sweep's own report, and
curves of fewer points. Python has it by np.load (moe/report/packed.py says what is in it). moe ablate does not go on
with it.
"""

import dataclasses
import os
import pathlib

from absl import flags

from moe.errors import UserError
from moe.files.paths import local_path
from moe.report import imbalance, packed
from moe.report.results import averages
from moe.report.run import Run, load_run
from moe.sweep import jobs, manifest

EVERY = flags.DEFINE_integer('every', 10, 'Steps between rows of metrics.jsonl.', lower_bound=1)
LOADS_EVERY = flags.DEFINE_integer('loads_every', 50, 'Steps between rows of load_history.jsonl.', lower_bound=1)


def main(argv):
  if len(argv) != 3:
    raise UserError('usage: moe thin SWEEP OUT')
  source, out = (local_path(arg, name) for arg, name in zip(argv[1:], ('SWEEP', 'OUT'), strict=True))
  if source.resolve() == out.resolve():
    raise UserError(f'{out} is the sweep itself; choose another folder for the copy')
  sweep, runs = _finished(source)
  devices = imbalance.device_counts(sweep.base.model.num_experts)
  thinned = {name: _thinned(run, devices) for name, run in runs.items()}
  before, there = _packed_before(out)
  packed.write(out, manifest.merge(out, before, sweep) if before else sweep, there | thinned)
  print(f'{out / packed.FILE}: {len(runs)} runs packed, {(out / packed.FILE).stat().st_size / 1e6:.1f} MB in all')


def _finished(source: pathlib.Path) -> tuple[manifest.Sweep, dict[str, Run]]:
  """A sweep and its finished runs, by folder."""
  if os.path.lexists(source / packed.FILE):
    return packed.read(source)
  sweep = manifest.read(source)
  runs = {run.folder: load_run(source / run.folder) for run in sweep.runs if jobs.is_finished(source / run.folder)}
  if not runs:
    raise UserError(f'{source} has no finished run')
  return sweep, runs


def _packed_before(out: pathlib.Path) -> tuple[manifest.Sweep | None, dict[str, Run]]:
  """What is in OUT already."""
  if os.path.lexists(out / packed.FILE):
    return packed.read(out)
  if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
    raise UserError(f'{out} is there already and has no {packed.FILE}; choose another folder for the copy')
  return None, {}


def _thinned(run: Run, devices: list[int]) -> Run:
  """The run as it is to be packed: without what tells of the machine, and with some of its rows."""
  public = lambda fields: {key: value for key, value in fields.items() if key != 'command'}  # it has a machine's paths
  info = public(run.info) | {'starts': [public(start) for start in run.starts]}
  rows = [{key: _short(value) for key, value in row.items()} for row in _some(run.rows, EVERY.value)]
  history = _some(run.load_history, LOADS_EVERY.value)
  return dataclasses.replace(run, info=info, rows=rows, load_history=history, averages=averages(run, devices))


def _some(rows, every):
  return [row for i, row in enumerate(rows) if i in (0, len(rows) - 1) or row['step'] % every == 0]


def _short(value):
  return float(f'{value:.6g}') if isinstance(value, float) else value
