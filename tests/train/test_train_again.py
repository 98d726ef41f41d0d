"""Training in this process, on its 16 devices: continuation, other meshes, signals, and every kind of bad input."""

import concurrent.futures
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess

import kept_numbers
import numpy as np
import pytest
from golden import rows
from small_runs import SAMPLED, config, write_corpus

from moe.commands import run as whole
from moe.errors import UserError
from moe.files import read_json
from moe.model import flops
from moe.parallel import mesh
from moe.train import loop, run_dir

pytestmark = pytest.mark.usefixtures('unrendered')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory, unrendered):
  """A run of 12 steps that nobody disturbed."""
  workdir = tmp_path_factory.mktemp('run') / 'plain'
  assert whole.train(config(corpus, **SAMPLED), str(workdir))['finished']
  return workdir


def test_numbers_are_those_that_are_kept(finished, tmp_path):
  """To what versions of JAX and kinds of CPU round differently; a step that computes anything else is far off."""
  kept = json.loads(kept_numbers.FILE.read_text())
  found = kept_numbers.numbers(finished, tmp_path / 'exported')
  assert found['text'] == kept['text']
  for name in ('metrics', 'evals'):
    assert len(found[name]) == len(kept[name])
    for got, want in zip(found[name], kept[name], strict=True):
      assert got == pytest.approx(want, rel=1e-4), name
  assert found['norms'] == pytest.approx(kept['norms'], rel=1e-5)


def test_mfu_is_of_all_devices_where_their_peak_is_known(corpus, tmp_path, monkeypatch):
  monkeypatch.setitem(flops.PEAK_BF16_FLOPS_PER_S, 'cpu', 5e9)
  changes = {'train.steps': 1, 'train.eval_every': 0, 'mesh.data': 2}
  summary = whole.train(config(corpus, **changes), str(tmp_path))
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert row['mfu'] == summary['mfu'] == pytest.approx(row['model_tflop_per_s'] * 1e12 / (2 * 5e9))


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


def test_config_json_may_be_edited_while_the_run_goes_on(corpus, tmp_path):
  """It is compared when the run is started again, and costs no steps before that."""

  class Edits(loop.Callback):
    def logged(self, run, row):
      if row['step'] == 3:
        (tmp_path / 'config.json').write_text('an editor was here')

  changes = {'train.steps': 4, 'train.eval_every': 0, 'checkpoint.every_steps': 1}
  assert loop.train(config(corpus, **changes), str(tmp_path), [Edits()])
  assert (tmp_path / 'checkpoints' / '4').is_dir()
  with pytest.raises(UserError, match=r'config\.json is no valid JSON'):
    loop.train(config(corpus, **changes), str(tmp_path))


def test_fewer_steps_than_there_are_is_refused(finished, corpus):
  before = {path: path.read_bytes() for path in finished.rglob('*.json*') if path.is_file()}
  with pytest.raises(UserError, match=r'is at step 12; config train\.steps = 6 must be at least that'):
    loop.train(config(corpus, **{'train.steps': 6}), str(finished))
  assert {path: path.read_bytes() for path in finished.rglob('*.json*') if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
  settings = config(corpus, **{'optimizer.learning_rate': 1e30, 'optimizer.warmup_steps': 0, 'train.eval_every': 0})
  with pytest.raises(UserError, match=r'step \d+: loss .*not finite; (no checkpoint yet|the last good checkpoint)'):
    whole.train(settings, str(tmp_path))
  assert all(np.isfinite(row['loss']) for row in rows(tmp_path))


def test_evaluations_are_no_steps_time_and_are_finite(corpus, tmp_path, monkeypatch):
  """By a clock on which a step takes 5 s and an evaluation 100, with an evaluation between two rows."""
  clock, make_train_step = [0.0], loop.step.make_train_step
  found = {'val_loss': 1.0, 'val_bits_per_byte': 1.0, 'max_vio_global': 0.0, 'load_LE': [[0] * 8]}

  def takes(seconds, action):
    def timed(*arguments):
      clock[0] += seconds
      return action(*arguments)

    return timed

  monkeypatch.setattr(loop.time, 'perf_counter', lambda: clock[0])
  monkeypatch.setattr(loop.step, 'make_train_step', lambda *arguments: takes(5, make_train_step(*arguments)))
  monkeypatch.setattr(loop.evaluate, 'evaluate', takes(100, lambda *_: found))
  settings = config(corpus, **{'train.steps': 3, 'train.log_every': 2, 'train.eval_every': 1})
  assert loop.train(settings, str(tmp_path))
  assert [json.loads(line)['step_s'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == [5, 5]
  found['val_loss'] = math.nan
  with pytest.raises(UserError, match=r'step 3: val_loss = nan in the evaluation'):
    loop.train(settings, str(tmp_path))


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


def test_sequence_longer_than_the_text(tmp_path, corpus):
  with pytest.raises(UserError, match='sequence longer than'):
    whole.train(config(corpus, **{'data.seq_len': 100_000}), str(tmp_path / 'run'))


def test_tokenizer_and_vocabulary_disagree(tmp_path, corpus):
  with pytest.raises(UserError, match=r'model\.vocab_size'):
    whole.train(config(corpus, **{'model.vocab_size': 200}), str(tmp_path / 'run'))
