"""The host's side of a training run: data in, metrics out, checkpoints, evaluation, interruption and resumption."""

import collections
import contextlib
import math
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from moe import evaluate, feed, flops, mesh, run_dir, state, step
from moe.balance import metrics as balance_metrics
from moe.checkpoint import Checkpoints, abstract_like
from moe.config import Config
from moe.data import prepare
from moe.data.batches import Batches
from moe.data.cached import cache_dir
from moe.data.corpus import load_corpus
from moe.data.tokenizer import load_tokenizer
from moe.errors import UserError
from moe.files import write_atomically
from moe.inference.generate import continuation
from moe.inference.sampling import Sampling
from moe.logbook import Logbook
from moe.paths import local_path
from moe.report.run import write_report
from moe.validation import profile_range

SAMPLING = Sampling(temperature=0.8)  # of the report's sample


def train(config: Config, workdir: str, command: str = '') -> dict | None:
  """Trains, or goes on training, the run in `workdir`.

  Returns:
    The summary of the finished run (as in summary.json), or None if a signal ended it early, with everything saved.

  Raises:
    UserError: bad settings, data, mesh, checkpoint or disk; or a loss that is not finite.
  """
  path = local_path(workdir, 'workdir')
  mesh.setup_devices(config.mesh)
  device_mesh = mesh.make_mesh(config)
  mesh.check_memory(config, device_mesh)
  run_dir.check_run(path, config)
  use_compilation_cache(config)
  corpus = load_corpus(config.data, leave_out=[path])
  tokenizer = load_tokenizer(config.data, config.model.vocab_size, corpus)
  for remark in tokenizer.remarks:
    say(remark)
  rows = prepare.pack_splits(corpus, tokenizer, config.data)
  run_dir.make_dir(path)
  if jax.process_index() == 0:
    for line in prepare.describe(path, corpus, tokenizer, rows, config.data):  # first: it refuses other text
      say(line)
    run_dir.describe_run(path, config, device_mesh, command or run_dir.command_line())
  with _stop_on_signal() as stop, contextlib.closing(Run(config, path, device_mesh, rows, tokenizer)) as run:
    return run.finish() if run.train(stop) else None


def use_compilation_cache(config: Config) -> None:
  """Keeps compiled programs on disk, unless JAX's own setting already says where, or there is no cache."""
  folder = cache_dir(config.data)
  if folder and not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(folder / 'xla'))


class Run:
  """One process's view of a run: the compiled steps, the state and the files."""

  def __init__(self, config: Config, path: pathlib.Path, device_mesh, rows: dict, tokenizer):
    """Compiles nothing yet; restores the newest checkpoint or makes a fresh state. Raises UserError."""
    self.config = step.resolve(config, device_mesh, mesh.platform_of(device_mesh))
    self.path, self.mesh, self.rows, self.tokenizer = path, device_mesh, rows, tokenizer
    self.batches = Batches(rows['train'], config.train.batch_size, config.train.seed)
    self.train_step = step.make_train_step(self.config, device_mesh)
    self.eval_step = step.make_eval_step(self.config, device_mesh)
    self.checkpoints = Checkpoints(path, config.checkpoint.keep)
    self.state, self.done, self.tokens = self._start()
    self.logbook = Logbook(path, self.done, config.train.steps) if jax.process_index() == 0 else None
    self._row_time, self._row_step = time.perf_counter(), self.done
    self._flops_per_token = flops.matmul_flops_per_token(self.config)
    self._peak_flops_per_s = flops.peak_bf16_flops_per_s(device_mesh.devices.flat[0].device_kind)

  def _start(self):
    """(state, steps done, tokens seen): from the newest checkpoint, another run's weights, or nothing."""
    like = abstract_like(state.abstract(self.config), state.shardings(self.config, self.mesh))
    latest = self.checkpoints.latest()
    if latest is not None:
      restored, meta = self.checkpoints.restore(latest, like)
      say(f'resuming {self.path} at step {latest}')
      return restored, latest, meta['tokens']
    fresh = state.create(self.config, self.mesh)
    if source := self.config.train.init_from:
      folder = local_path(source, 'config train.init_from')
      if not (folder / 'checkpoints').is_dir():
        raise UserError(f'config train.init_from = {source!r} is not a run directory with checkpoints')
      other = Checkpoints(folder)
      fresh = other.restore_weights(fresh)
      say(f'starting from the weights of {source} at step {other.latest()}')
      other.close()
    return fresh, 0, 0

  def train(self, stop) -> bool:
    """Steps until train.steps or until `stop()`; True if all steps are done and saved."""
    train, total = self.config.train, self.config.train.steps
    every, eval_every = self.config.checkpoint.every_steps, train.eval_every
    profile = profile_range(train.profile_steps)
    pending = collections.deque()
    with _progress(self.done, total) as bar, contextlib.ExitStack() as trace:
      while self.done < total and not stop():
        if self.done + 1 in profile[:1]:
          trace.enter_context(jax.profiler.trace(str(self.path / 'profile')))
        batch = feed.train_batch(self.batches, self.done, train.microbatches, self.mesh)
        self.state, out = self.train_step(self.state, batch)
        self.done += 1
        pending.append((self.done, out))
        saving, evaluating = _due(self.done, every), _due(self.done, eval_every)
        # The host reads a step's metrics while the device runs the next one; whoever needs the state waits for them.
        while len(pending) > (0 if saving or evaluating or self.done == total else 1):
          self._record(*pending.popleft(), bar)
        if self.done in profile[-1:]:
          jax.block_until_ready(self.state)
          trace.close()
        # Evaluated first, so that whoever resumes from this checkpoint finds the evaluation in the log.
        if evaluating and self.done < total:
          self._evaluate()
        if saving:
          self._save()
      while pending:
        self._record(*pending.popleft(), bar)
    self._save()
    self.checkpoints.wait()
    if self.done < total:
      say(f'stopped and saved at step {self.done} of {total}; the same command continues')
    return self.done >= total

  def finish(self) -> dict:
    """Final evaluation, sample and report. Returns the summary, {} on all processes but the first."""
    self._evaluate_all()
    if self.config.train.sample_tokens:
      text = self._sample()
      if self.logbook:
        write_atomically(self.path / 'sample.txt', text)
    return write_report(self.path) if self.logbook else {}

  def _sample(self) -> str:
    train, weights = self.config.train, (self.state.params, self.state.balance['bias_LE'])
    what = train.sample_prompt, train.sample_tokens, SAMPLING, train.seed
    return continuation(*weights, self.tokenizer, self.config, self.mesh, *what)

  def close(self) -> None:
    """Closes the files and waits for checkpoints on their way."""
    if self.logbook:
      self.logbook.close()
    self.checkpoints.close()

  def _save(self):
    self.checkpoints.save(
      self.state,
      {
        'step': self.done,
        'tokens': self.tokens,
        'seed': self.config.train.seed,
        'data': {'next_batch': self.done, 'epoch': self.batches.epoch(self.done)},
      },
    )

  def _evaluate(self):
    """Logs a point of the curve of validation losses: on the same rows at every step."""
    found = self._measured(self.config.train.eval_sequences)
    self._log_evaluation({'set': 'sample' if self._is_sample() else 'full', **found})

  def _evaluate_all(self):
    """Logs the result of the run, on all rows; beside it the curve's last point, where that has been on a sample."""
    found = {'set': 'full', **self._measured(0)}
    if self._is_sample() and self.config.train.eval_every:
      sample = self._measured(self.config.train.eval_sequences)
      found['sample'] = {key: value for key, value in sample.items() if key != 'load_LE'}
    self._log_evaluation(found)

  def _is_sample(self):
    return len(self.rows['val'].spread(self.config.train.eval_sequences)) < len(self.rows['val'])

  def _measured(self, sequences):
    return evaluate.evaluate(self.eval_step, self.state, self.rows['val'], self.config, self.mesh, sequences)

  def _log_evaluation(self, found):
    if self.logbook:
      self.logbook.write('evals', {'step': self.done, **found})
    bits, vio = found['val_bits_per_byte'], found['max_vio_global']
    what = 'validation' if found['set'] == 'full' else 'sample of the validation text'
    say(f'step {self.done}: {what} {bits:.3f} bits/byte, MaxVio_global {vio:.3f}')
    self._row_time = time.perf_counter()  # evaluation is not the next step's time

  def _record(self, done, out, bar):
    """Checks, counts and logs one step's metrics, once they are there."""
    out = jax.device_get(out)
    self.tokens += int(out.pop('batch_tokens'))
    load_LE = out.pop('load_LE')
    row = {key: float(value) for key, value in out.items()}
    if not (math.isfinite(row['total_loss']) and math.isfinite(row['grad_norm'])):
      last = self.checkpoints.latest()
      good = f'the last good checkpoint is step {last} in {self.checkpoints.path}' if last else 'no checkpoint yet'
      raise UserError(f'step {done}: loss {row["total_loss"]}, gradient norm {row["grad_norm"]}: not finite; {good}')
    bar.set_postfix_str(f'loss {row["loss"]:.3f}', refresh=False)
    bar.update()
    if not (_due(done, self.config.train.log_every) or done == self.config.train.steps):
      return
    now, steps = time.perf_counter(), done - self._row_step
    step_s = (now - self._row_time) / steps
    self._row_time, self._row_step = now, done
    tokens_per_s = self.config.train.batch_size * self.config.data.seq_len / step_s
    row |= {
      'max_vio_batch': float(balance_metrics.max_vio(load_LE).mean()),
      'cv_batch': float(balance_metrics.cv(load_LE).mean()),
      'tokens': self.tokens,
      'tokens_per_s': tokens_per_s,
      'step_s': step_s,
      'model_tflop_per_s': tokens_per_s * self._flops_per_token / 1e12,
    }
    if self._peak_flops_per_s:
      row['mfu'] = tokens_per_s * self._flops_per_token / (self.mesh.size * self._peak_flops_per_s)
    bar.set_postfix_str(
      f'loss {row["loss"]:.3f}, MaxVio {row["max_vio_batch"]:.2f}, {tokens_per_s:,.0f} tokens/s', refresh=False
    )
    if self.logbook:
      self.logbook.write('metrics', {'step': done, **row})
      self.logbook.write('load_history', {'step': done, 'load_LE': load_LE.tolist()})


def say(text: str) -> None:
  """One line to the user, from the first process only."""
  if jax.process_index() == 0:
    tqdm.tqdm.write(text, file=sys.stderr)


def _due(done, every):
  return bool(every) and done % every == 0


def _progress(done, total):
  quiet = not sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    initial=done,
    unit='step',
    dynamic_ncols=True,
    mininterval=15 if quiet else 0.2,  # a log file wants lines, not a moving bar
    disable=jax.process_index() > 0,
  )


@contextlib.contextmanager
def _stop_on_signal():
  """A function that says whether SIGTERM or Ctrl-C has come; all processes of a run get the same answer."""
  seen = []
  handlers = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}

  def stop():
    if jax.process_count() == 1:
      return bool(seen)
    return bool(multihost_utils.process_allgather(np.array(bool(seen))).any())

  try:
    yield stop
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
