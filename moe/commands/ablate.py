"""Runs a sweep of configs/sweeps/declared.py, or goes on with it, and writes its report.

moe ablate --sweep=balance --scale=tiny --workdir=runs/balance --seeds=0,1,2
moe ablate --grid=optimizer.learning_rate=1e-3,3e-3 --grid=balance.bias_rule=sign,quantile --workdir=runs/grid

Finished runs are skipped and interrupted ones resumed, so the same command continues after SIGTERM, a crash or kill -9.
A run that fails is listed at the end and stops no other; the exit status is then 1. The workdir gets sweep.json, a
folder per run, called VARIANT,seed=SEED, and report.html, table.csv and runs.csv. --report_only reports what there is,
also while the sweep is still going.
"""

import pathlib
import sys

from absl import flags

from moe.errors import UserError
from moe.files.paths import CONFIGS, local_path
from moe.report.sweep import write_sweep_report
from moe.sweep import backends, declared, jobs, manifest

SWEEP = flags.DEFINE_string('sweep', None, 'Name of a sweep in the file of definitions; without --grid: balance.')
GRID = flags.DEFINE_multi_string(
  'grid',
  [],
  'key=value,value: a run with each value; repeatable: with each combination, and of each variant of --sweep.',
)
SCALE = flags.DEFINE_string('scale', 'tiny', 'Name of a scale there: the config that every variant starts from.')
DEFINED = CONFIGS / 'sweeps/declared.py'
DEFINITIONS = flags.DEFINE_string('definitions', str(DEFINED), 'The file of definitions.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all runs, made if missing.')
SEEDS = flags.DEFINE_list('seeds', '0', 'Seeds, separated by commas; every variant is run with each.')
SET = flags.DEFINE_multi_string('set', [], 'key=value of every run, such as data.paths=my_text/; repeatable.')
ONLY = flags.DEFINE_list('only', '', 'Run these variants only (names or patterns such as switch_*, by commas).')
JOBS = flags.DEFINE_integer('jobs', 0, 'Runs at a time; 0: one, or as many as the Ray cluster has room for.')
GPUS = flags.DEFINE_integer('gpus_per_run', 0, 'GPUs that each run has to itself; 0: all runs see all.')
CPUS = flags.DEFINE_integer('cpus_per_run', 1, 'CPUs that Ray keeps for each run.')
BACKEND = flags.DEFINE_enum('backend', 'local', ['local', 'ray'], 'Processes of this machine, or a Ray cluster.')
RAY_ADDRESS = flags.DEFINE_string('ray_address', '', 'host:port of a Ray cluster; default: a running or new one.')
MOST_AT_A_TIME = 10_000  # runs, GPUs or CPUs
REPORT_ONLY = flags.DEFINE_bool('report_only', False, 'Report the runs in --workdir, run nothing.')


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; settings look like --set=train.steps=500')
  if not WORKDIR.value:
    raise UserError('--workdir is missing; give the folder for all runs, such as --workdir=runs/balance')
  workdir = local_path(WORKDIR.value, '--workdir')
  status = 0 if REPORT_ONLY.value else tell(run_sweep(workdir))
  print(write_sweep_report(workdir))
  sys.exit(status)


def run_sweep(workdir: pathlib.Path) -> list[jobs.Result]:
  """Declares, checks and runs the sweep that the flags name. Raises UserError before anything is run."""
  sweep = declared.load(DEFINITIONS.value, SWEEP.value, SCALE.value, SET.value, SEEDS.value, GRID.value)
  wanted = declared.select(sweep, ONLY.value)
  if not all(0 <= flag.value <= MOST_AT_A_TIME for flag in (JOBS, GPUS, CPUS)):
    raise UserError(f'--jobs, --gpus_per_run and --cpus_per_run must be 0 to {MOST_AT_A_TIME}')
  limit = JOBS.value or (len(wanted) * len(sweep.seeds) if BACKEND.value == 'ray' else 1)
  backend: backends.Ray | backends.Local
  if BACKEND.value == 'ray':
    backend = backends.Ray(RAY_ADDRESS.value, CPUS.value, GPUS.value)
  else:
    backend = backends.Local(limit, GPUS.value)
  todo = [jobs.job_of(run, workdir) for run in sweep.runs if run.variant in wanted]
  manifest.open_folder(workdir, sweep)
  try:
    return jobs.run_all(todo, backend, limit)
  finally:
    backend.close()


def tell(results: list[jobs.Result]) -> int:
  """Says what is not finished and why; 0 if all is, else 1."""
  unfinished = [result for result in results if result.status != 'finished']
  for result in unfinished:
    print(f'{result.status}: {result.name}: {result.reason}', file=sys.stderr)
  if unfinished:
    print(f'{len(unfinished)} of {len(results)} runs are not finished; the same command continues', file=sys.stderr)
  return int(bool(unfinished))
