"""experiments/ablate.py from outside: real runs, small enough to take seconds."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import environment, script

from moe.errors import UserError
from moe.files import read_json
from moe.sweep import jobs

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = ('sign', 'none', 'switch_global_0.01')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  rng = np.random.default_rng(0)
  for name in range(12):
    words = rng.choice(['def ', 'return ', 'x', 'y', ' = ', '(', ')', '\n', 'import '], 400)
    (folder / f'{name:02}.py').write_text(''.join(words))
  return folder


def command(*arguments):
  return [sys.executable, str(ROOT / 'experiments/ablate.py'), *map(str, arguments)]


def ablate(*arguments, timeout=300):
  return subprocess.run(
    command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
  )


def smoke(corpus, workdir):
  only = f'--only={",".join(VARIANTS)}'
  return ['--scale=smoke', f'--set=data.paths={corpus}', only, '--jobs=2', f'--workdir={workdir}']


def table(workdir):
  """table.csv without what the clock decides."""
  lines = (workdir / 'table.csv').read_text().splitlines()
  names = lines[0].split(',')
  kept = [i for i, name in enumerate(names) if not name.startswith(('tokens_per_s', 'throughput'))]
  return [[line.split(',')[i] for i in kept] for line in lines]


DEFINITIONS = f"""
import runpy
from moe.sweep.variants import chain, named
from moe.files import read_json
declared = runpy.run_path({str(ROOT / 'configs/sweeps/declared.py')!r})
SCALES, bad = declared['SCALES'], named({{'bad': {{'data.paths': '/no/such/text'}}}})
SWEEPS = {{'balance': lambda: chain(declared['SWEEPS']['balance'](), bad)}}
"""


@pytest.fixture(scope='module')
def first_sweep(corpus, tmp_path_factory):
  """(workdir, the ended process) of three variants that nobody disturbed, and a fourth that cannot run."""
  folder = tmp_path_factory.mktemp('sweep')
  (folder / 'definitions.py').write_text(DEFINITIONS)
  only = f'--only={",".join(("bad", *VARIANTS))}'
  workdir = folder / 'plain'
  return workdir, ablate(*smoke(corpus, workdir), f'--definitions={folder / "definitions.py"}', only)


@pytest.fixture(scope='module')
def finished(first_sweep):
  workdir, process = first_sweep
  assert all((workdir / f'{variant},seed=0' / 'summary.json').exists() for variant in VARIANTS), process.stderr
  return workdir


def test_a_failing_variant_is_listed_and_the_rest_reported(first_sweep):
  workdir, process = first_sweep
  assert process.returncode == 1
  assert "failed: bad,seed=0: error: path '/no/such/text'" in process.stderr
  assert '1 of 4 runs are not finished; the same command continues' in process.stderr
  assert [row[:2] for row in table(workdir)[1:]] == [[variant, '1'] for variant in VARIANTS]


def test_a_sweep_leaves_everything_behind(finished):
  for variant, rule in zip(VARIANTS, ('sign', 'none', 'none'), strict=True):
    folder = finished / f'{variant},seed=0'
    assert json.loads((folder / 'summary.json').read_text())['bias_rule'] == rule
    assert '--config=default' in (folder / 'log.txt').read_text()
  assert [row[0] for row in table(finished)] == ['variant', *VARIANTS]
  assert (finished / 'report.html').stat().st_size > 50_000


def read(workdir, variant, name):
  lines = (workdir / f'{variant},seed=0' / f'{name}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_every_variant_begins_with_the_same_weights_and_batch(finished):
  """The first forward pass is the same: cross-entropy, loads of every expert, entropy of the gates."""
  first = {variant: read(finished, variant, 'metrics')[0] for variant in VARIANTS}
  loads = {variant: read(finished, variant, 'load_history')[0]['load_LE'] for variant in VARIANTS}
  for variant in VARIANTS[1:]:
    for key in ('loss', 'gate_entropy'):
      assert first[variant][key] == pytest.approx(first['sign'][key], rel=1e-6), (variant, key)
    assert loads[variant] == loads['sign']
  assert first['switch_global_0.01']['aux_loss'] > 0
  assert first['sign']['bias_max'] > 0 == first['none']['bias_max']


def test_every_variant_sees_as_many_tokens_of_the_same_text(finished):
  digests = {json.loads((finished / f'{name},seed=0' / 'data.json').read_text())['digest'] for name in VARIANTS}
  assert len(digests) == 1
  keys = ('step', 'tokens', 'learning_rate')
  budget = lambda variant: [[row[key] for key in keys] for row in read(finished, variant, 'metrics')]
  assert budget(VARIANTS[0]) == budget(VARIANTS[1]) == budget(VARIANTS[2])
  assert len({read(finished, variant, 'evals')[-1]['val_tokens'] for variant in VARIANTS}) == 1


def test_max_vio_of_every_variant_is_of_its_validation_loads(finished):
  for variant in VARIANTS:
    result = read(finished, variant, 'evals')[-1]
    load_LE = np.array(result['load_LE'], float)
    vio = np.mean([(layer.max() - layer.mean()) / layer.mean() for layer in load_LE])
    assert result['max_vio_global'] == pytest.approx(vio, rel=1e-12)
    assert load_LE.sum() > 0


def test_kill_9_and_again_gives_the_same_table_and_repeats_no_finished_run(finished, corpus, tmp_path):
  """The first variant is finished already; the sweep is killed when the second has begun."""
  variants = VARIANTS[:2]
  workdir = shutil.copytree(
    finished, tmp_path / 'killed', ignore=lambda _, names: {name for name in names if name.startswith(VARIANTS[1:])}
  )
  arguments = [*smoke(corpus, workdir), f'--only={",".join(variants)}', '--jobs=1']
  process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
  first, second = (workdir / f'{variant},seed=0' for variant in variants)
  deadline = time.monotonic() + 200
  while process.poll() is None and not (second / 'config.json').exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL, 'the sweep must still have been going'
  before = (first / 'summary.json').stat().st_mtime_ns
  result = ablate(*arguments)
  assert result.returncode == 0, result.stderr
  assert (first / 'summary.json').stat().st_mtime_ns == before
  assert (second / 'log.txt').read_text().count('$ ') == 1, 'the run that outlived the sweep went on'
  assert table(workdir) == table(finished)[:3]


def test_seeds_that_the_folder_had_before_are_run_no_further(finished, corpus, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'more')
  description = read_json(workdir / 'sweep.json')
  (workdir / 'sweep.json').write_text(json.dumps(description | {'seeds': [0, 1]}))
  result = ablate(*smoke(corpus, workdir), '--seeds=0')
  assert result.returncode == 0, result.stderr
  assert not list(workdir.glob('*,seed=1'))


def test_a_bad_command_line_is_one_line(tmp_path):
  result = ablate('--sweep=balanse', f'--workdir={tmp_path / "runs"}')
  assert result.returncode == 2
  assert "--sweep = 'balanse' must be one of balance, gamma" in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1, result.stderr
  assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--report_only', 'is no results folder of a sweep'),
    ('--jobs=-1', 'must be 0 to 10000'),
    ('extra', "unexpected argument 'extra'"),
  ],
)
def test_other_bad_arguments(tmp_path, argument, message):
  with pytest.raises(UserError, match=message) as caught:
    script('ablate', argument, f'--workdir={tmp_path / "runs"}')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'runs').exists()


# --------------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope='module')
def ray():
  pytest.importorskip('ray', reason="needs Ray: pip install -e '.[ray]'")


@pytest.mark.usefixtures('ray')
def test_ray_gives_the_same_table(finished, corpus, tmp_path):
  result = ablate(*smoke(corpus, tmp_path / 'ray'), '--backend=ray', '--ray_address=local')
  assert result.returncode == 0, result.stderr
  assert table(tmp_path / 'ray') == table(finished)


@pytest.mark.usefixtures('ray')
def test_sigterm_reaches_the_runs_on_ray_though_sigint_is_ignored(corpus, tmp_path):
  """As in a job that a shell script starts in the background: Ray stops its tasks by SIGINT."""
  arguments = [*smoke(corpus, tmp_path / 'ray'), '--only=sign', '--backend=ray', '--ray_address=local']
  process = subprocess.Popen(
    command(*arguments, '--set=train.steps=1000000', '--set=train.eval_every=0', '--set=checkpoint.every_steps=0'),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
  )
  run = tmp_path / 'ray' / 'sign,seed=0'
  deadline = time.monotonic() + 200
  while process.poll() is None and not jobs.steps_done(run) and time.monotonic() < deadline:
    time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=100)
  assert process.returncode == 1, said
  assert 'stopped: sign,seed=0: the same command continues' in said
  assert list((run / 'checkpoints').iterdir()), 'it saved'


@pytest.mark.usefixtures('ray')
@pytest.mark.parametrize(
  ('address', 'message'),
  [
    ('127.0.0.1:1', "no Ray cluster answers at --ray_address = '127.0.0.1:1'"),
    ('..:6379', "no Ray cluster answers at --ray_address = '..:6379'"),
    ('host:²', "'host:²' must look like host:6379"),
  ],
)
def test_an_unreachable_ray_cluster_is_one_line(corpus, tmp_path, address, message):
  result = ablate(*smoke(corpus, tmp_path / 'ray'), '--backend=ray', f'--ray_address={address}')
  assert result.returncode == 2
  assert message in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
  assert not (tmp_path / 'ray').exists()


@pytest.mark.usefixtures('ray')
def test_a_port_of_something_else_is_no_ray_cluster():
  """It accepts connections and says nothing: Ray itself would try for minutes."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    program = f'from moe.sweep import backends; backends.JOIN_S = 2.0; backends.Ray({address!r})'
    result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert result.returncode == 1
  assert f'what answers at {address!r} is no Ray cluster' in result.stderr.splitlines()[-1]
