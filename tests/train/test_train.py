"""The training command from outside: what a run leaves behind, and what comes of signals, a full disk and mistakes."""

import json
import os
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from golden import rows
from processes import environment
from small_runs import ROOT, SAMPLED, command, config, flags, loads, run, write_corpus

from moe.balance.metrics import LOGGED, METRICS
from moe.commands import run as whole
from moe.config import from_config_dict
from moe.errors import UserError
from moe.files import read_json
from moe.model import flops
from moe.parallel.mesh import make_mesh
from moe.train.checkpoint import Checkpoints, abstract_like
from moe.train.state import abstract, shardings


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
  """A run of 12 steps that nobody disturbed, from the command line."""
  workdir = tmp_path_factory.mktemp('run') / 'plain'
  result = run(workdir, flags(corpus, **SAMPLED))
  assert result.returncode == 0, result.stderr
  return workdir


def test_a_run_leaves_everything_behind(finished):
  assert [row['step'] for row in rows(finished)] == list(range(1, 13))
  assert [row['step'] for row in rows(finished, 'evals')] == [4, 8, 12]
  *way, end = rows(finished, 'evals')
  assert [row['set'] for row in way] == ['sample', 'sample']
  assert {row['val_tokens'] for row in [*way, end['sample']]} == {end['sample']['val_tokens']}
  assert end['set'] == 'full'
  data = json.loads((finished / 'data.json').read_text())
  assert (end['val_tokens'], end['val_bytes']) == (data['val_tokens'], data['val_bytes'])
  assert end['sample']['val_bytes'] == end['sample']['val_tokens'] < end['val_bytes'], 'a token of this run is a byte'
  assert abs(end['sample']['val_bits_per_byte'] - end['val_bits_per_byte']) < 0.05
  assert all(0 < load_LE.sum() <= 16 * 32 * 2 for load_LE in loads(finished))
  assert max(load_LE.sum() for load_LE in loads(finished)) == 16 * 32 * 2
  assert all(
    {'loss', 'max_vio_batch', 'bias_min', 'gate_entropy', 'grad_norm/router'} <= row.keys() for row in rows(finished)
  )
  summary = json.loads((finished / 'summary.json').read_text())
  for key in ('val_bits_per_byte', 'trigram_bits_per_byte', 'gzip_bits_per_byte', 'max_vio_global'):
    assert np.isfinite(summary[key])
  assert summary['val_bits_per_byte'] == end['val_bits_per_byte']
  assert 'evaluated_on' not in summary
  assert summary['finished']
  info = json.loads((finished / 'config.json').read_text())
  assert info['config']['model']['d_model'] == 32
  assert info['versions']['jax'] == jax.__version__
  assert 'experiments/train.py' in info['command']
  assert (finished / 'report.html').stat().st_size > 10_000
  assert (finished / 'sample.txt').read_text().startswith('def ')
  assert list((finished / 'tensorboard').iterdir())
  assert rows(finished)[-1]['loss'] < rows(finished)[0]['loss']


def test_rows_count_the_models_flops(finished, corpus):
  per_token = flops.matmul_flops_per_token(config(corpus))
  for line in (finished / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    assert row['model_tflop_per_s'] == pytest.approx(row['tokens_per_s'] * per_token / 1e12)
    assert 'mfu' not in row, 'the peak of a CPU is not known'


def test_metrics_of_users_cannot_have_the_names_of_what_rows_hold(finished):
  found = {key for row in (*rows(finished), *rows(finished, 'evals')) for key in row}
  measured = {f'{name}_{of}' for name in METRICS for of in ('batch', 'global')}
  could_be_metrics = {key for key in found - measured if re.fullmatch('[a-z0-9_]+', key)}
  assert could_be_metrics <= set(LOGGED)


def test_settings_in_the_run_directory_rebuild_the_config(finished, corpus):
  info = read_json(finished / 'config.json')
  assert from_config_dict(info['config']) == config(corpus, **SAMPLED)


def test_bias_stays_float32_through_the_checkpoint(finished, corpus):
  settings = config(corpus)
  mesh = make_mesh(settings)
  like = abstract_like(abstract(settings), shardings(settings, mesh))
  checkpoints = Checkpoints(finished, keep=2)
  state, meta, _ = checkpoints.restore(12, like)
  checkpoints.close()
  bias_LE = np.asarray(state.balance['bias_LE'])
  assert bias_LE.dtype == np.float32
  steps = np.zeros_like(bias_LE)
  for load_LE in loads(finished):
    steps += np.sign(load_LE.mean(1, keepdims=True) - load_LE)
  np.testing.assert_allclose(bias_LE, steps * settings.balance.gamma, rtol=1e-5, atol=1e-9)
  assert np.abs(bias_LE).max() > 0
  assert meta['step'] == int(state.step) == 12
  assert meta['data']['next_batch'] == 12


def interrupted(workdir, corpus, rows_first, number):
  """Starts a run, sends it a signal once it has logged some rows, and returns its exit status and stderr."""
  process = subprocess.Popen(
    command(workdir, flags(corpus)), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
  )
  metrics, deadline = workdir / 'metrics.jsonl', time.monotonic() + 200
  while process.poll() is None and time.monotonic() < deadline:
    if metrics.exists() and metrics.read_bytes().count(b'\n') >= rows_first:
      break
    time.sleep(0.005)
  process.send_signal(number)
  return process.wait(), process.communicate()[1]


def test_kill_9_and_again_gives_the_same_numbers(finished, corpus, tmp_path):
  status, _ = interrupted(tmp_path, corpus, 6, signal.SIGKILL)
  assert status == -signal.SIGKILL, 'the run must still have been going'
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 99, "loss"')  # what a crash in mid-write leaves
  result = run(tmp_path, flags(corpus))
  assert result.returncode == 0, result.stderr
  for name in ('metrics', 'load_history', 'evals'):
    assert rows(tmp_path, name) == rows(finished, name)


def test_sigterm_saves_and_the_run_continues(finished, corpus, tmp_path):
  status, said = interrupted(tmp_path, corpus, 2, signal.SIGTERM)
  assert status == 0
  assert 'the same command continues' in said
  stopped = [row['step'] for row in rows(tmp_path)]
  assert stopped == list(range(1, len(stopped) + 1))
  assert len(stopped) < 12
  assert (tmp_path / 'checkpoints' / str(len(stopped))).is_dir()
  assert whole.train(config(corpus), str(tmp_path))['finished']
  assert [row['step'] for row in rows(tmp_path)] == list(range(1, 13))
  losses = [[row['loss'] for row in rows(folder)] for folder in (tmp_path, finished)]
  np.testing.assert_allclose(*losses, rtol=1e-5)  # in another process, whose sums may round otherwise


def test_two_processes_train_like_one(finished, corpus, tmp_path):
  shape = {'mesh.data': 2, 'mesh.expert': 4, 'mesh.cpu_devices': 4, 'train.steps': 4, 'train.eval_every': 0}
  address = f'localhost:{20000 + os.getpid() % 20000}'
  processes = [
    subprocess.Popen(
      command(
        tmp_path,
        flags(corpus, **shape, **{'mesh.coordinator': address, 'mesh.num_processes': 2, 'mesh.process_id': process_id}),
      ),
      cwd=ROOT,
      env=environment(),
      stderr=subprocess.PIPE,
      text=True,
    )
    for process_id in range(2)
  ]
  errors = [process.communicate(timeout=300)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  one, two = rows(finished), rows(tmp_path)
  assert [row['step'] for row in two] == [1, 2, 3, 4]
  # The learning-rate schedule differs with train.steps after the warm-up; the first two steps do not.
  np.testing.assert_allclose([row['loss'] for row in two[:2]], [row['loss'] for row in one[:2]], rtol=1e-6)
  assert rows(tmp_path, 'load_history')[0] == rows(finished, 'load_history')[0]


def test_a_write_that_fails_half_way_ends_the_run(corpus, tmp_path):
  """The disk fills up while a checkpoint is being written: here, no file may grow past 60 kB."""
  changes = {'model.d_expert': 256, 'model.num_layers': 1, 'model.num_dense_layers': 0, 'train.eval_every': 0}
  settings = flags(corpus, **changes, **{'train.steps': 3, 'checkpoint.every_steps': 2})
  environ = environment() | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  limited = ['sh', '-c', 'ulimit -f 117; exec "$@"', 'sh', *command(tmp_path, settings)]  # blocks of 512 bytes
  result = subprocess.run(limited, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
  assert result.returncode == 2
  assert 'Traceback' not in result.stderr
  assert '\nerror: cannot write a checkpoint' in result.stderr
  assert 'there is no complete checkpoint' in result.stderr
  assert not [path for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()]
  assert not (tmp_path / 'summary.json').exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.model.num_expert=8'], 'num_expert'),
    (['--config.train.steps=many'], 'many'),
    (['--config.mesh.expert=4'], 'mesh.cpu_devices=4'),
    (['extra'], "unexpected argument 'extra'"),
  ],
)
def test_bad_command_lines_are_one_line(tmp_path, arguments, message):
  result = run(tmp_path / 'run', arguments)
  assert result.returncode == 2
  assert message in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1, result.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [({'data.paths': '/no/such/file.txt'}, '/no/such/file.txt'), ({'mesh.pipe': 2}, r'mesh\.pipe = 2')],
)
def test_settings_that_no_run_can_have_leave_no_folder(corpus, tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as caught:
    whole.train(config(corpus, **changes), str(tmp_path / 'run'))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'run').exists()
