"""Runs what a sweep has not finished yet: skipping, resuming, counting steps, collecting failures.

A run is a child process that appends to `log.txt` in its folder and holds the lock of that folder as long as it lives,
also when the sweep that started it was killed: a second sweep on the same folder waits instead of starting it twice.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tqdm

from moe import plugins
from moe.errors import UserError, one_line
from moe.files import open_own, parse_json, read_json, step_of
from moe.files.lock import try_lock
from moe.files.paths import COMMAND
from moe.sweep.manifest import LOCK, RunOf
from moe.sweep.variants import flatten

LOG = 'log.txt'
PROMPT = '$ '  # begins each attempt's command in the log
POLL_S = 0.5
TAIL_BYTES = 1 << 16  # of a file whose last line is wanted


@dataclasses.dataclass(frozen=True)
class Job:
  """One run to be made: `command`, started in `cwd`, works in `folder` and goes on there if started again."""

  folder: pathlib.Path
  command: tuple[str, ...]
  cwd: pathlib.Path
  steps: int

  @property
  def name(self) -> str:
    return self.folder.name


class Result(NamedTuple):
  """How a job ended: 'finished', 'stopped' (asked to, with everything saved) or 'failed', and why."""

  name: str
  status: str
  reason: str = ''


def job_of(run: RunOf, workdir: pathlib.Path) -> Job:
  """The job whose command is `moe train` with all settings that differ from the defaults."""
  folder = workdir.resolve() / run.folder
  defaults = flatten(type(run.config)())
  changed = [f'--config.{key}={value}' for key, value in flatten(run.config).items() if value != defaults[key]]
  command = *COMMAND, 'train', '--config=default'
  return Job(
    folder,
    (*command, f'--workdir={folder}', *plugins.arguments(), *changed),
    pathlib.Path.cwd(),
    run.config.train.steps,
  )


def run_all(jobs: Sequence[Job], backend, limit: int) -> list[Result]:
  """Works off all jobs, at most `limit` at a time, with one progress bar over their steps.

  SIGTERM or Ctrl-C stops the running ones, which save, and starts no more.

  Args:
    backend: of `moe.sweep.backends`.

  Returns:
    A result per job, in the order of `jobs`; jobs that were not started are 'stopped'.
  """
  results = {job.name: Result(job.name, 'finished') for job in jobs if is_finished(job.folder)}
  waiting = collections.deque(job for job in jobs if job.name not in results)
  running: dict[concurrent.futures.Future, Job] = {}
  with stop_event() as stop, _progress(jobs) as bar:
    while running or (waiting and not stop.is_set()):
      while waiting and len(running) < limit and not stop.is_set():
        job = waiting.popleft()
        running[backend.submit(job)] = job
      ended, _ = concurrent.futures.wait(running, POLL_S, concurrent.futures.FIRST_COMPLETED)
      if stop.is_set():
        backend.stop()
      for future in ended:
        result = backend.result(future, running.pop(future))
        results[result.name] = result
        _say_ended(result)
      _show(bar, jobs, results, running.values())
  return [results.get(job.name, Result(job.name, 'stopped', 'not started')) for job in jobs]


def run_job(job: Job, environment: dict[str, str], stop: threading.Event) -> Result:
  """Runs one job to its end in a child process; if `stop` is set, asks the child to save and end."""
  status = 0
  try:
    job.folder.mkdir(parents=True, exist_ok=True)
    with _locked(job.folder / LOCK, stop) as lock, open_own(job.folder / LOG, os.O_APPEND) as log:
      if stop.is_set():
        return Result(job.name, 'stopped', 'not started')
      if not is_finished(job.folder):  # whoever held the lock before may have finished it
        status = _run_child(job, environment, stop, lock, log)
  except OSError as error:
    return Result(job.name, 'failed', f'cannot run in {job.folder}: {error.strerror}')
  if is_finished(job.folder):
    return Result(job.name, 'finished')
  if stop.is_set() and status in (0, -signal.SIGTERM):  # the latter before it could save, or had anything to save
    return Result(job.name, 'stopped', 'the same command continues')
  return Result(job.name, 'failed', _why(status, last_words(job.folder)))


def _why(status: int, words: str) -> str:
  if words.startswith('error: '):
    return words
  ended = f'killed by {signal.Signals(-status).name}' if status < 0 else f'exit status {status}'
  return f'{ended}, after {words!r}' if words else ended


def is_finished(folder: pathlib.Path) -> bool:
  """Whether the run in `folder` has all its steps and its final evaluation."""
  try:
    return read_json(folder / 'summary.json').get('finished') is True
  except UserError:
    return False  # missing or damaged: the run goes on, and writes it again


def steps_done(folder: pathlib.Path) -> int:
  """Steps that the run in `folder` has logged."""
  for line in reversed(_tail(folder / 'metrics.jsonl').split(b'\n')):
    try:
      return step_of(parse_json(line, 'the line'), 'the line')
    except UserError:
      continue  # cut off while being written, or by the start of the tail
  return 0


def _run_child(job, environment, stop, lock, log) -> int:
  log.write(f'\n{PROMPT}{shlex.join(job.command)}\n'.encode())
  log.flush()
  child = subprocess.Popen(
    job.command,
    cwd=job.cwd,
    stdin=subprocess.DEVNULL,
    stdout=log,
    stderr=log,
    env=environment,
    pass_fds=(lock,),  # the lock lasts until the last process that has it open is gone
    start_new_session=True,  # Ctrl-C in a terminal reaches the sweep only, which passes it on
  )
  asked = False
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      return child.wait(POLL_S)
    if stop.is_set() and not asked:
      child.terminate()
      asked = True


@contextlib.contextmanager
def _locked(path: pathlib.Path, stop) -> Iterator[int]:
  """Waits for the lock on `path` and yields its file descriptor; without the lock if `stop` is set first."""
  lock = try_lock(path)
  if lock is None:
    _say(f'{path.parent.name}: another process is still at it; waiting for it')
  while lock is None and not stop.wait(POLL_S):
    lock = try_lock(path)
  with lock or path.open() as file:
    yield file.fileno()


@contextlib.contextmanager
def stop_event() -> Iterator[threading.Event]:
  """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C acts as usual."""
  event = threading.Event()

  def on_signal(number, _):
    if event.is_set():
      raise KeyboardInterrupt
    _say('stopping: the runs at work save first')
    event.set()

  handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield event
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def _progress(jobs):
  done = sum(map(_credit, jobs))
  return tqdm.tqdm(
    total=sum(job.steps for job in jobs),
    initial=done,
    unit='step',
    dynamic_ncols=True,
    smoothing=0,  # time left by the mean rate: compiling and evaluating come in bursts
    miniters=0,
    mininterval=POLL_S if sys.stderr.isatty() else 15,  # a log file wants lines, not a moving bar
  )


def _show(bar, jobs, results, running):
  counts = collections.Counter(result.status for result in results.values())
  failed = f', {counts["failed"]} failed' if counts['failed'] else ''
  names = ' '.join(job.name for job in running)
  bar.set_postfix_str(
    f'{counts["finished"]} of {len(jobs)} runs finished{failed}; now {names or "none"}', refresh=False
  )
  bar.update(sum(map(_credit, jobs)) - bar.n)


def _credit(job):
  return job.steps if is_finished(job.folder) else min(steps_done(job.folder), job.steps)


def _say_ended(result: Result):
  _say(f'{result.name}: {result.status}' + (f': {result.reason}' if result.reason else ''))


def _say(text):
  tqdm.tqdm.write(text, file=sys.stderr)


def last_words(folder: pathlib.Path) -> str:
  """What the last attempt said last, an error if there is one; '' without a log."""
  lines = [line.strip() for line in _tail(folder / LOG).decode(errors='replace').replace('\r', '\n').splitlines()]
  began = max((i for i, line in enumerate(lines) if line.startswith(PROMPT)), default=-1)
  said = [line for line in lines[began + 1 :] if line]
  errors = [line for line in said if line.startswith('error: ')]
  return one_line((errors or said or [''])[-1])


def _tail(path: pathlib.Path) -> bytes:
  if not path.is_file():  # a pipe would be waited for
    return b''
  try:
    with path.open('rb') as file:
      file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
      return file.read()
  except OSError:
    return b''
