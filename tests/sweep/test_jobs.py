"""Working off jobs: skipping, resuming, failures, signals, and two sweeps on one folder. The jobs are small scripts."""

import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe.config import Config
from moe.errors import UserError
from moe.files import paths
from moe.sweep import backends, jobs, manifest
from moe.sweep.variants import axis, overlay

# A run in little: a step each 10 ms from where the last attempt ended; SIGTERM ends it between two steps.
TRAIN = """
import json, os, pathlib, signal, sys, time
folder, steps, fail_at = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with (folder / 'starts').open('a') as file:
  file.write(os.environ.get('CUDA_VISIBLE_DEVICES', '-') + chr(10))
rows = (folder / 'metrics.jsonl').open('a+')
rows.seek(0)
done = len(rows.readlines())
while done < steps and not stop:
  time.sleep(0.01)
  done += 1
  if done == fail_at:
    print('error: step', done, 'is bad', file=sys.stderr)
    sys.exit(2)
  rows.write(json.dumps({'step': done}) + chr(10))
  rows.flush()
if done == steps:
  (folder / 'summary.json').write_text(json.dumps({'finished': True}))
"""
STEPS = 30


def job(folder, steps=STEPS, fail_at=0):
  command = (sys.executable, '-c', TRAIN, str(folder), str(steps), str(fail_at))
  return jobs.Job(folder, command, folder.parent, steps)


def run_all(all_jobs, limit=1, gpus=0):
  backend = backends.Local(limit, gpus)
  try:
    return jobs.run_all(all_jobs, backend, limit)
  finally:
    backend.close()


def starts(folder):
  return (folder / 'starts').read_text().split()


def steps_of(folder):
  return [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def wait_for(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_all_run_once_and_a_second_time_none(tmp_path):
  todo = [job(tmp_path / name) for name in 'abc']
  results = run_all(todo, limit=2)
  assert results == [jobs.Result(name, 'finished') for name in 'abc']
  assert run_all(todo, limit=2) == results
  for name in 'abc':
    assert starts(tmp_path / name) == ['-']
    assert steps_of(tmp_path / name) == list(range(1, STEPS + 1))


def test_a_failure_stops_no_other_and_is_tried_again(tmp_path, capfd):
  todo = [job(tmp_path / 'a', fail_at=5), job(tmp_path / 'b')]
  assert run_all(todo) == [jobs.Result('a', 'failed', 'error: step 5 is bad'), jobs.Result('b', 'finished')]
  shown = capfd.readouterr().err
  assert 'a: failed: error: step 5 is bad' in shown
  assert '1 of 2 runs finished, 1 failed' in shown
  mended = [job(tmp_path / 'a'), job(tmp_path / 'b')]
  assert [result.status for result in run_all(mended)] == ['finished', 'finished']
  assert len(starts(tmp_path / 'a')) == 2
  assert len(starts(tmp_path / 'b')) == 1
  assert steps_of(tmp_path / 'a') == list(range(1, STEPS + 1))


def test_a_command_that_cannot_start_is_a_failure(tmp_path):
  (tmp_path / 'file').write_text('')
  broken = dataclasses.replace(job(tmp_path / 'b'), command=('/no/such/program',))
  results = run_all([job(tmp_path / 'file'), broken])
  assert [result.status for result in results] == ['failed', 'failed']
  assert 'cannot run in' in results[0].reason


def test_a_log_that_is_a_pipe_is_a_failure_and_not_waited_for(tmp_path):
  folder = tmp_path / 'a,seed=0'
  folder.mkdir()
  os.mkfifo(folder / jobs.LOG)
  (result,) = run_all([job(folder)])
  assert (result.status, 'it is a pipe or device' in result.reason) == ('failed', True)


def test_last_words_are_of_the_last_attempt(tmp_path):
  assert jobs.last_words(tmp_path) == ''
  (tmp_path / jobs.LOG).write_text('$ a\nerror: old\n\n$ a\nhalf \r done\nerror: new\n  0% left\n')
  assert jobs.last_words(tmp_path) == 'error: new'
  (tmp_path / jobs.LOG).write_text('$ a\nerror: old\n\n$ a\n10% \r 20% \n')
  assert jobs.last_words(tmp_path) == '20%'


@pytest.mark.parametrize(
  ('program', 'reason'),
  [
    ('import os; os.kill(os.getpid(), 9)', 'killed by SIGKILL'),
    ('import os; print(" 10% | 3/30", flush=True); os.kill(os.getpid(), 9)', "killed by SIGKILL, after '10% | 3/30'"),
    ('import sys; print("what"); sys.exit(3)', "exit status 3, after 'what'"),
    ('import sys; print("error: no text"); sys.exit(2)', 'error: no text'),
  ],
)
def test_a_failure_says_how_it_ended(tmp_path, program, reason):
  command = (sys.executable, '-c', program)
  assert run_all([dataclasses.replace(job(tmp_path / 'a'), command=command)])[0].reason == reason


def test_each_run_has_gpus_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
  run_all([job(tmp_path / name) for name in 'ab'], limit=2, gpus=2)
  assert sorted(starts(tmp_path / 'a') + starts(tmp_path / 'b')) == ['4,5', '6,7']
  with pytest.raises(UserError, match='3 jobs of 2 GPUs need 6'):
    backends.Local(3, 2)


def sweep_process(folder):
  """Another process that works off two jobs in `folder`."""
  code = f"""
import sys
sys.path[:0] = {[str(paths.PACKAGE.parent), str(pathlib.Path(__file__).parent)]}
from test_jobs import job, run_all
import pathlib
folder = pathlib.Path({str(folder)!r})
print([result.status for result in run_all([job(folder / 'a', steps=100), job(folder / 'b', steps=100)])])
"""
  return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_run_save_and_starts_no_other(tmp_path, number):
  process = sweep_process(tmp_path)
  wait_for(lambda: jobs.steps_done(tmp_path / 'a') > 2)
  process.send_signal(number)
  output, errors = process.communicate(timeout=20)
  assert output.strip() == "['stopped', 'stopped']"
  assert 'a: stopped: the same command continues' in errors
  assert not (tmp_path / 'b').exists()
  done = jobs.steps_done(tmp_path / 'a')
  assert 2 < done < 100
  assert run_all([job(tmp_path / 'a', steps=100)])[0].status == 'finished'
  assert steps_of(tmp_path / 'a') == list(range(1, 101))


def test_kill_9_of_the_sweep_loses_nothing_and_starts_nothing_twice(tmp_path):
  process = sweep_process(tmp_path)
  wait_for(lambda: jobs.steps_done(tmp_path / 'a') > 2)
  process.kill()
  process.communicate()
  assert not jobs.is_finished(tmp_path / 'a'), 'the run must have outlived its sweep'
  results = run_all([job(tmp_path / 'a', steps=100), job(tmp_path / 'b', steps=100)], limit=2)
  assert [result.status for result in results] == ['finished', 'finished']
  assert len(starts(tmp_path / 'a')) == len(starts(tmp_path / 'b')) == 1
  assert steps_of(tmp_path / 'a') == list(range(1, 101))


def test_a_locked_folder_is_waited_for(tmp_path):
  (tmp_path / 'a').mkdir()
  stop = threading.Event()
  with (tmp_path / 'a' / jobs.LOCK).open('a') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    found = []
    thread = threading.Thread(target=lambda: found.append(jobs.run_job(job(tmp_path / 'a'), dict(os.environ), stop)))
    thread.start()
    time.sleep(0.3)
    assert not (tmp_path / 'a' / 'starts').exists()
    stop.set()
    thread.join(20)
  assert found == [jobs.Result('a', 'stopped', 'not started')]


def test_steps_are_read_from_the_end_of_half_written_rows(tmp_path):
  assert jobs.steps_done(tmp_path) == 0
  row = json.dumps({'step': 7, 'text': 'x' * 1000})
  (tmp_path / 'metrics.jsonl').write_text(f'{row}\n' * 200 + '{"step": 8, "lo')
  assert jobs.steps_done(tmp_path) == 7


@pytest.mark.parametrize(
  'text', ['', '[' * 100_000, '[true]', '{"finished": "no", "step": "9"}', '\0\0', '{"step": -1}']
)
def test_damaged_files_of_a_run_say_nothing(tmp_path, text):
  for name in ('summary.json', 'metrics.jsonl'):
    (tmp_path / name).write_text(f'{text}\n')
  assert not jobs.is_finished(tmp_path)
  assert jobs.steps_done(tmp_path) == 0
  for name in ('summary.json', 'metrics.jsonl'):
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
  assert not jobs.is_finished(tmp_path)
  assert jobs.steps_done(tmp_path) == 0


def test_the_command_of_a_run_rebuilds_its_config(tmp_path):
  """Its flags, read back by the scripts' own parser, are the run's settings."""
  base = overlay(Config(), {'data.paths': 'a/,b/', 'balance.gamma': 3e-5, 'model.tie_embeddings': True})
  run = manifest.make('s', 'x', base, axis('train.steps', [9]), [4]).runs[0]
  made = jobs.job_of(run, tmp_path)
  code = (
    'import sys; from absl import flags; from moe import cli\n'
    'config = cli.define_config("tiny"); flags.DEFINE_string("workdir", "", "")\n'
    'flags.FLAGS(sys.argv); print(repr(config()), flags.FLAGS.workdir)'
  )
  arguments = made.command[2:]
  done = subprocess.run(
    [sys.executable, '-c', code, *arguments], capture_output=True, text=True, cwd=paths.PACKAGE.parent, check=True
  )
  assert done.stdout.strip() == f'{run.config!r} {tmp_path / "steps=9,seed=4"}'
