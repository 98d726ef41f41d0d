"""The training command from outside: interruption, resumption, other meshes, and every kind of bad input."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import environment

from moe.balance import load_history
from moe.balance.load_history import LoadHistory
from moe.commands import run as whole
from moe.config import Config, from_config_dict, to_config_dict
from moe.errors import UserError
from moe.files import read_json
from moe.model import flops
from moe.parallel import mesh
from moe.parallel.mesh import make_mesh
from moe.train import loop, run_dir
from moe.train.checkpoint import Checkpoints, abstract_like
from moe.train.state import abstract, shardings

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMES = ('tokens_per_s', 'step_s', 'model_tflop_per_s', 'mfu')
SMALL = {
  'model.d_model': 32,
  'model.num_layers': 2,
  'model.d_ff': 64,
  'model.d_expert': 32,
  'model.num_experts': 8,
  'model.top_k': 2,
  'model.kv_lora_rank': 16,
  'model.qk_nope_dim': 8,
  'model.qk_rope_dim': 8,
  'model.v_dim': 8,
  'model.mtp_depth': 0,
  'data.seq_len': 32,
  'data.val_fraction': 0.1,
  'train.steps': 12,
  'train.batch_size': 16,
  'train.eval_every': 4,
  'train.eval_sequences': 16,
  'train.sample_tokens': 0,
  'optimizer.warmup_steps': 2,
  'checkpoint.every_steps': 4,
  'precision.matmul': 'highest',
}
SAMPLED = {'train.sample_tokens': 3}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  rng = np.random.default_rng(0)
  for name in range(20):
    words = rng.choice(['def ', 'return ', 'x', 'y', ' = ', '(', ')', '\n', 'import '], 400)
    (folder / f'{name:02}.py').write_text(''.join(words))
  return folder


def flags(corpus, **changes):
  return [f'--config.{key}={value}' for key, value in (SMALL | {'data.paths': corpus} | changes).items()]


def config(corpus, **changes) -> Config:
  settings = to_config_dict(Config())
  for key, value in (SMALL | {'data.paths': str(corpus)} | changes).items():
    section, name = key.split('.')
    settings[section][name] = value
  return from_config_dict(settings)


def command(workdir, arguments):
  return [sys.executable, 'experiments/train.py', '--config=configs/default.py', f'--workdir={workdir}', *arguments]


def run(workdir, arguments):
  return subprocess.run(
    command(workdir, arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
  )


def rows(workdir, name='metrics'):
  lines = (pathlib.Path(workdir) / f'{name}.jsonl').read_text().splitlines()
  return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def loads(workdir):
  return [row['load_LE'] for row in LoadHistory(pathlib.Path(workdir) / load_history.FILE, (1, 8))]


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


def test_mfu_is_of_all_devices_where_their_peak_is_known(corpus, tmp_path, monkeypatch):
  monkeypatch.setitem(flops.PEAK_BF16_FLOPS_PER_S, 'cpu', 5e9)
  changes = {'train.steps': 1, 'train.eval_every': 0, 'mesh.data': 2}
  summary = whole.train(config(corpus, **changes), str(tmp_path))
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert row['mfu'] == summary['mfu'] == pytest.approx(row['model_tflop_per_s'] * 1e12 / (2 * 5e9))


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


def test_sigterm_saves_and_the_same_command_continues(finished, corpus, tmp_path):
  status, said = interrupted(tmp_path, corpus, 2, signal.SIGTERM)
  assert status == 0
  assert 'the same command continues' in said
  stopped = [row['step'] for row in rows(tmp_path)]
  assert stopped == list(range(1, len(stopped) + 1))
  assert len(stopped) < 12
  assert (tmp_path / 'checkpoints' / str(len(stopped))).is_dir()
  assert run(tmp_path, flags(corpus)).returncode == 0
  assert rows(tmp_path) == rows(finished)


def largest_file(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_checkpoint_before_a_damaged_one_continues_on_another_mesh(finished, corpus, tmp_path, capsys):
  """An unattended restart says so, and the rows past that checkpoint are those that it logs."""
  copy = shutil.copytree(finished, tmp_path / 'copy')
  victim = largest_file(copy / 'checkpoints' / '12' / 'params')
  victim.write_bytes(victim.read_bytes()[:100])
  settings = config(corpus, **{'mesh.data': 2, 'mesh.expert': 4, 'mesh.tensor': 2})
  assert whole.train(settings, str(copy))['finished']
  assert re.search(r'checkpoint .*/12 is damaged: params/.*; going back to step 8, .*\n', capsys.readouterr().err)
  assert sorted(path.name for path in (copy / 'checkpoints').iterdir()) == ['12', '8']
  again, before = rows(copy), rows(finished)
  assert [row['step'] for row in again] == list(range(1, 13))
  assert again[:8] == before[:8]
  np.testing.assert_allclose([row['loss'] for row in again], [row['loss'] for row in before], rtol=1e-5)
  assert rows(copy, 'load_history')[8] == rows(finished, 'load_history')[8]
  before, after = json.loads((copy / 'config.json').read_text())['starts']
  assert before == json.loads((finished / 'config.json').read_text())['starts'][0]
  assert [before[key] for key in ('step', 'mesh', 'dispatch')] == [0, dict.fromkeys(mesh.AXES, 1), 'local']
  assert after['step'] == 8
  assert after['mesh'] == {'pipe': 1, 'data': 2, 'expert': 4, 'tensor': 2}
  assert (after['dispatch'], after['grouped_matmul'], after['device']) == ('all_gather', 'blocked', '16 x cpu (cpu)')
  assert after['changed'] == {
    'train.sample_tokens': [3, 0],
    **{f'mesh.{axis}': [0, size] for axis, size in after['mesh'].items() if size > 1},
  }
  assert 'holes' not in after


def stopping(monkeypatch, after):
  """A signal comes when the run has asked so many times whether one has."""
  asked = []

  @contextlib.contextmanager
  def signals():
    yield lambda: (asked.append(1), len(asked) > after)[1]

  monkeypatch.setattr(loop, '_stop_on_signal', signals)


def test_a_signal_in_the_final_evaluation_or_the_sample_stops_it(finished, corpus, tmp_path, monkeypatch, capsys):
  copy = tmp_path / 'copy'
  shutil.copytree(finished, copy)
  (copy / 'report.html').unlink()
  settings, batches = config(corpus), -(-json.loads((finished / 'data.json').read_text())['val_tokens'] // (32 * 16))
  with monkeypatch.context() as patched:
    stopping(patched, after=1)
    assert whole.train(settings, str(copy)) is None
    assert [row['step'] for row in rows(copy, 'evals')] == [4, 8]
    assert 'the same command continues with the evaluation' in capsys.readouterr().err
    told = []

    def continuation(*arguments):
      told.extend(arguments[-1](0, [1]) for _ in range(2))  # the caller's word on whether to stop
      return 'cut short'

    patched.setattr(whole, 'continuation', continuation)
    sampled = -(-config(corpus).train.eval_sequences // 16)
    stopping(patched, after=batches + sampled + 1)
    assert whole.train(config(corpus, **SAMPLED), str(copy)) is None
    assert told == [False, True]
  assert (copy / 'sample.txt').read_text() == (finished / 'sample.txt').read_text()
  assert not (copy / 'report.html').exists()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # outside the main thread, where Python sets no handlers
    assert pool.submit(whole.train, settings, str(copy)).result()['finished']
  assert [row['step'] for row in rows(copy, 'evals')] == [4, 8, 12]
  np.testing.assert_allclose(rows(copy, 'evals')[2]['val_loss'], rows(finished, 'evals')[2]['val_loss'], rtol=1e-6)
  assert [row['step'] for row in rows(copy)] == list(range(1, 13))
  assert (copy / 'report.html').exists()


def test_the_first_signal_is_told_and_a_second_ctrl_c_acts_as_usual():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with loop._stop_on_signal() as stop:
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_lost_rows_are_marked_and_a_lost_evaluation_is_made_again(finished, corpus, tmp_path, capsys):
  copy = tmp_path / 'copy'
  shutil.copytree(finished, copy)
  shutil.rmtree(copy / 'checkpoints' / '12')
  for name, kept in (('metrics', 5), ('evals', 1)):
    lines = (copy / f'{name}.jsonl').read_text().splitlines(keepends=True)
    (copy / f'{name}.jsonl').write_text(''.join(lines[:kept]))
  assert whole.train(config(corpus), str(copy))['finished']
  assert [row['step'] for row in rows(copy)] == [1, 2, 3, 4, 5, 9, 10, 11, 12]
  assert rows(copy, 'load_history') == rows(finished, 'load_history')
  assert [row['step'] for row in rows(copy, 'evals')] == [4, 8, 12]
  np.testing.assert_allclose(rows(copy, 'evals')[1]['val_loss'], rows(finished, 'evals')[1]['val_loss'], rtol=1e-6)
  said, holes = capsys.readouterr().err, json.loads((copy / 'config.json').read_text())['starts'][1]['holes']
  assert [hole.split(',')[0] for hole in holes] == ['metrics.jsonl ends at step 5', 'evals.jsonl ends at step 4']
  assert all(hole in said and hole in (copy / 'report.html').read_text() for hole in holes)
  assert 'parameters' in said
  assert 'dispatch local, grouped_matmul blocked, attention blocked' in said


def test_a_run_has_one_owner(finished, corpus):
  before = {file: file.read_bytes() for file in finished.glob('*.json*')}
  owner, refused = run_dir.owned(finished, config(corpus), print), pytest.raises(UserError, match='is at work on the')
  with owner, refused:
    whole.train(config(corpus), str(finished))
  assert {file: file.read_bytes() for file in finished.glob('*.json*')} == before


def test_a_run_whose_checkpoints_were_deleted_keeps_its_rows(finished, corpus, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(finished, copy)
  for step in (copy / 'checkpoints').iterdir():
    shutil.rmtree(step)
  with pytest.raises(UserError, match='has no checkpoints any more'):
    whole.train(config(corpus), str(copy))
  assert rows(copy) == rows(finished)


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


def test_warm_start_takes_weights_and_bias_but_not_the_step(finished, corpus, tmp_path):
  settings = config(corpus, **{'train.init_from': str(finished), 'train.steps': 1, 'train.eval_every': 0})
  whole.train(settings, str(tmp_path))
  first = rows(tmp_path)[0]
  assert first['step'] == 1
  assert first['loss'] < rows(finished)[0]['loss'] - 0.3
  assert first['bias_max'] > settings.balance.gamma * 2


def test_profile_writes_a_trace_and_loads_have_a_cadence_of_their_own(corpus, tmp_path):
  changes = {'train.steps': 3, 'train.profile_steps': '2:2', 'train.eval_every': 0, 'train.load_every': 2}
  whole.train(config(corpus, **changes), str(tmp_path))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  steps = [[row['step'] for row in rows(tmp_path, name)] for name in ('metrics', 'load_history')]
  assert steps == [[1, 2, 3], [2, 3]]


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
  settings = config(corpus, **{'optimizer.learning_rate': 1e30, 'optimizer.warmup_steps': 0, 'train.eval_every': 0})
  with pytest.raises(UserError, match=r'step \d+: loss .*not finite; (no checkpoint yet|the last good checkpoint)'):
    whole.train(settings, str(tmp_path))
  assert all(np.isfinite(row['loss']) for row in rows(tmp_path))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.d_expert': 64}, r'model\.d_expert = 32 and cannot continue with 64'),
    ({'train.seed': 1}, r'train\.seed = 0 and cannot continue with 1'),
    ({'data.seq_len': 16}, r'data\.seq_len = 32 and cannot continue with 16'),
    ({'balance.bias_rule': 'smebu'}, r"balance\.bias_rule = 'sign' and cannot continue"),
  ],
)
def test_a_run_cannot_go_on_with_other_settings(finished, corpus, changes, message):
  before = (finished / 'config.json').read_bytes()
  with pytest.raises(UserError, match=message):
    whole.train(config(corpus, **changes), str(finished))
  assert (finished / 'config.json').read_bytes() == before


def test_other_text_under_the_same_path_is_refused(finished, corpus, tmp_path):
  copy, text = tmp_path / 'copy', tmp_path / 'text'
  shutil.copytree(finished, copy)
  shutil.copytree(corpus, text)
  (text / '00.py').write_text('changed = True\n' * 50)
  info = read_json(copy / 'config.json')
  info['config']['data']['paths'] = str(text)
  (copy / 'config.json').write_text(json.dumps(info))
  with pytest.raises(UserError, match='began with other text'):
    whole.train(config(text), str(copy))


def test_text_that_moved_and_holds_the_run_is_the_same(finished, corpus, tmp_path, capsys):
  """The workdir lies within the text, which is elsewhere than when the run began."""
  text = tmp_path / 'text'
  shutil.copytree(corpus, text)
  shutil.copytree(finished, text / 'run')
  assert whole.train(config(text), str(text / 'run'))['finished']
  said = capsys.readouterr().err
  assert f'the text was {corpus} before; it has moved, and is the same' in said
  assert json.loads((text / 'run' / 'data.json').read_text())['corpus'] == str(text)
  assert rows(text / 'run', 'evals') == rows(finished, 'evals')


def test_a_refused_run_is_left_as_it_was(finished, corpus, tmp_path):
  copy, settings = tmp_path / 'copy', config(corpus)
  shutil.copytree(finished, copy)
  (copy / 'data.json').write_text('{}')
  before = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
  with pytest.raises(UserError, match=r'data\.json is damaged: digest is None'):
    whole.train(settings, str(copy))
  assert {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()} == before


def test_a_checkpoint_of_another_model(finished, corpus, tmp_path):
  copy = shutil.copytree(finished, tmp_path / 'copy')
  info = read_json(copy / 'config.json')
  info['config']['model']['d_expert'] = 16
  (copy / 'config.json').write_text(json.dumps(info))
  with pytest.raises(UserError, match='does not fit the model'):
    whole.train(config(corpus, **{'model.d_expert': 16}), str(copy))
  assert (copy / 'checkpoints' / '12').is_dir()


def test_workdir_that_cannot_be_written(corpus, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is a file; choose a folder'):
    whole.train(config(corpus), str(tmp_path / 'file'))
  with pytest.raises(UserError, match='not writable'):
    whole.train(config(corpus), str(tmp_path / 'file' / 'below'))


@pytest.fixture
def small_disk(tmp_path):
  """A file system of one megabyte."""
  folder = tmp_path / 'small'
  folder.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], capture_output=True)
  if mounted.returncode:
    pytest.skip('needs the right to mount a tmpfs (root on Linux)')
  yield folder
  subprocess.run(['umount', folder], check=True)


def test_full_disk_is_one_line_and_leaves_no_half_checkpoint(corpus, small_disk):
  settings = config(corpus, **{'model.d_expert': 128, 'train.steps': 1, 'train.eval_every': 0})
  with pytest.raises(
    UserError, match=r'cannot write a checkpoint .* needs [\d,]+ bytes .* has [\d,]+ free; there is no'
  ):
    whole.train(settings, str(small_disk / 'run'))
  assert not list((small_disk / 'run' / 'checkpoints').iterdir())
  assert not (small_disk / 'run' / 'summary.json').exists()


def test_a_write_that_fails_half_way_ends_the_run(corpus, tmp_path):
  """The disk fills up while a checkpoint is being written: here, no file may grow past 60 kB."""
  settings = flags(
    corpus, **{'model.d_expert': 128, 'train.steps': 3, 'checkpoint.every_steps': 2, 'train.eval_every': 0}
  )
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
    (['--config.data.paths=/no/such/file.txt'], '/no/such/file.txt'),
    (['--config.mesh.pipe=2'], 'mesh.pipe = 2'),
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


def test_sequence_longer_than_the_text(tmp_path, corpus):
  with pytest.raises(UserError, match='sequence longer than'):
    whole.train(config(corpus, **{'data.seq_len': 100_000}), str(tmp_path / 'run'))


def test_tokenizer_and_vocabulary_disagree(tmp_path, corpus):
  with pytest.raises(UserError, match=r'model\.vocab_size'):
    whole.train(config(corpus, **{'model.vocab_size': 200}), str(tmp_path / 'run'))


def test_settings_in_the_run_directory_rebuild_the_config(finished, corpus):
  info = read_json(finished / 'config.json')
  assert from_config_dict(info['config']) == config(corpus, **SAMPLED)
