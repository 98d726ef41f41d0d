"""The host's side of a training run: data in, rows out, checkpoints, evaluation, interruption and resumption."""

import collections
import contextlib
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from moe.balance import metrics as balance_metrics
from moe.balance.load_history import rows_every
from moe.config import Config
from moe.data import prepare
from moe.data.batches import Batches
from moe.data.cached import use_compilation_cache
from moe.data.corpus import load_corpus
from moe.data.tokenizer import load_tokenizer
from moe.errors import UserError
from moe.files.paths import local_path
from moe.model import flops
from moe.parallel import mesh, processes
from moe.train import evaluate, experts, feed, run_dir, state, step
from moe.train.callbacks import Callback, loggers
from moe.train.checkpoint import Checkpoints, abstract_like, start_from
from moe.train.logbook import Logbook
from moe.validation import profile_range

NOT_OF_A_SAMPLE = ('load_LE', 'specialisation_bits', 'source_tokens')  # beside the result on all rows
MOST_BIASES = 200  # rows of load_history.jsonl that also hold the router bias


def train(config: Config, workdir: str, callbacks: Sequence[Callback] = (), command: str = '') -> bool:
  """Trains, or goes on training, the run in `workdir`.

  Args:
    config: as given, with 'auto' where it is left to the mesh.
    workdir: the run's directory, made if missing.
    callbacks: asked in this order, after the logger that train.logger names.
    command: that started the run, for config.json; that of this process if not given.

  Returns:
    Whether the run is finished; False if a signal ended it early, with everything saved.

  Raises:
    UserError: bad settings, data, mesh, checkpoint or disk; or a loss that is not finite.
  """
  path, callbacks = local_path(workdir, 'workdir'), [*loggers(config, say), *callbacks]
  with processes.joined(config.mesh, run_dir.shared_settings(config), _write) as peers:
    mesh.setup_devices(config.mesh)
    device_mesh = mesh.make_mesh(config)
    mesh.check_memory(config, device_mesh)
    run_dir.check_run(path, config)
    use_compilation_cache(config.data)
    corpus = load_corpus(config.data, leave_out=[path])
    tokenizer = load_tokenizer(config.data, config.model.vocab_size, corpus)
    peers.agree({'the text': corpus.digest, 'the tokenizer': tokenizer.digest})
    rows = prepare.pack_splits(corpus, tokenizer, config.data)
    with run_dir.owned(path, config, say), _stop_on_signal() as stop:
      if jax.process_index() == 0:
        _describe_data(path, corpus, tokenizer, rows, config.data)
      with contextlib.closing(Run(config, path, device_mesh, rows, tokenizer, stop, callbacks)) as run:
        run.describe(command or run_dir.command_line())
        return run.train() and run.finish()


def _describe_data(path: pathlib.Path, corpus, tokenizer, rows: dict, data):
  """Writes down what text a run has, or refuses other text than it began with; says so."""
  for line in [*tokenizer.remarks, *prepare.describe(path, corpus, tokenizer, rows, data)]:
    say(line)


class Run:
  """One process's view of a run: the compiled steps, the state and the files."""

  def __init__(self, config: Config, path: pathlib.Path, device_mesh, rows: dict, tokenizer, stop, callbacks=()):
    """Compiles nothing yet; restores the newest checkpoint or makes a fresh state. Raises UserError.

    Args:
      config: as given; 'auto' is resolved here.
      path: run directory, which this process owns if it is the first.
      device_mesh: from `mesh.make_mesh`.
      rows: 'train' and 'val', packed.
      tokenizer: that encoded them.
      stop: says whether to stop, to all processes the same; asked between steps and batches.
      callbacks: hear of rows, evaluations and the end, in this order.
    """
    self.given, self.stop, self.callbacks = config, stop, callbacks
    self.config = step.resolve(config, device_mesh, mesh.platform_of(device_mesh))
    self.path, self.mesh, self.rows, self.tokenizer = path, device_mesh, rows, tokenizer
    self.batches = Batches(rows['train'], config.train.batch_size, config.train.seed)
    self.train_step = step.make_train_step(self.config, device_mesh)
    self.flat_mesh = mesh.without_pipe(device_mesh)
    self.eval_step = step.make_eval_step(self.config, self.flat_mesh)
    flat = state.shardings(self.config, self.flat_mesh)
    self._copy = jax.jit(lambda weights: weights, out_shardings=state.Weights(flat.params, flat.balance))
    self.checkpoints = Checkpoints(path, config.checkpoint.keep)
    self.state, self.done, self.tokens, logged = self._start()
    if self.done > config.train.steps:
      raise UserError(f'{path} is at step {self.done}; config train.steps = {config.train.steps} must be at least that')
    first = jax.process_index() == 0
    self.logbook = Logbook(path, self.done, config.train.steps, logged) if first else None
    self._row_time, self._row_step = time.perf_counter(), self.done
    self._noted = False  # that there is a checkpoint, in config.json
    self._load_every = config.train.load_every or rows_every(config.train.log_every, config.train.steps)
    self._bias_every = rows_every(self._load_every, config.train.steps, MOST_BIASES)
    self._flops_per_token = flops.matmul_flops_per_token(self.config)
    self._peak_flops_per_s = flops.peak_bf16_flops_per_s(device_mesh.devices.flat[0].device_kind)

  def _start(self):
    """(state, steps done, tokens, bytes logged): from the newest checkpoint, another run's weights, or nothing."""
    like = abstract_like(state.abstract(self.config), state.shardings(self.config, self.mesh))
    if found := self.checkpoints.restore_newest(like):
      for remark in found.remarks:
        say(remark)
      say(f'resuming {self.path} at step {found.meta["step"]}')
      return found.state, found.meta['step'], found.meta['tokens'], found.meta.get('logged')
    fresh = state.create(self.config, self.mesh)
    if source := self.config.train.init_from:
      found = start_from(local_path(source, 'config train.init_from'), self.config.balance, fresh)
      fresh = found.state
      for remark in [*found.remarks, f'starting from the weights of {source} at step {found.meta["step"]}']:
        say(remark)
    return fresh, 0, 0, None

  def describe(self, command: str) -> None:
    """Writes config.json, and says what runs and what rows are missing."""
    if self.logbook:
      holes = self.logbook.holes
      say(run_dir.describe_run(self.path, self.given, self.mesh, command, self.done, holes))
      for hole in holes:
        say(f'{self.path}: {hole}; the run goes on, and config.json and the report keep this')

  def train(self) -> bool:
    """Steps until train.steps or until `stop()`; True if all steps are done and saved."""
    train, total = self.config.train, self.config.train.steps
    every, eval_every = self.config.checkpoint.every_steps, train.eval_every
    profile = profile_range(train.profile_steps)
    pending: collections.deque[tuple[int, dict]] = collections.deque()  # (step, its metrics on the device)
    if self.done < total and self._owes_evaluation():
      self._evaluate()
    with progress(self.done, total) as bar, contextlib.ExitStack() as trace:
      while self.done < total and not self.stop():
        if self.done + 1 in profile[:1]:
          trace.enter_context(jax.profiler.trace(str(self.path / 'profile')))
        batch = feed.train_batch(self.batches, self.done, train.microbatches, self.mesh)
        self.state, out = self.train_step(self.state, batch)
        self.done += 1
        if self.done == total or _due(self.done, self._bias_every):
          out |= {'bias_LE': jnp.copy(self.state.balance['bias_LE'])}  # before the next step takes its memory
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
    self._note_saved()
    if self.done < total:
      say(f'stopped and saved at step {self.done} of {total}; the same command continues')
    return self.done >= total

  def finish(self) -> bool:
    """The final evaluation, and what callbacks do at the end; False if a signal came."""
    if self._evaluate_all() and all(callback.finished(self) for callback in self.callbacks):
      return True
    say(f'stopped after step {self.done}, with everything saved; the same command continues with the evaluation')
    return False

  def close(self) -> None:
    """Closes the files and waits for checkpoints on their way."""
    with contextlib.ExitStack() as stack:
      stack.callback(self.checkpoints.close)
      for callback in self.callbacks:
        stack.callback(callback.closed, self)
      if self.logbook:
        stack.callback(self.logbook.close)

  def _note_saved(self):
    if self.logbook and not self._noted and self.checkpoints.latest() is not None:
      run_dir.note_saved(self.path)
      self._noted = True

  def weights(self) -> state.Weights:
    """Parameters and the rule's state on `flat_mesh`, for evaluation and generation; of a pipeline, copies."""
    found = state.Weights(self.state.params, self.state.balance)
    return found if self.flat_mesh is self.mesh else self._copy(found)

  def _save(self):
    self.checkpoints.save(
      self.state,
      {
        'step': self.done,
        'tokens': self.tokens,
        'seed': self.config.train.seed,
        'logged': self.logbook.sync() if self.logbook else None,
        'data': {'next_batch': self.done, 'epoch': self.batches.epoch(self.done)},
      },
    )
    self._note_saved()  # the one before, which is complete now

  def _owes_evaluation(self) -> bool:
    """Whether the periodic evaluation of this step is not in the log, as the run was stopped in it."""
    if not (self.done and _due(self.done, self.config.train.eval_every)):
      return False
    owes = self.logbook is not None and self.logbook.last_steps['evals'] != self.done
    return bool(multihost_utils.broadcast_one_to_all(np.array(owes)))

  def _evaluate(self) -> bool:
    """Logs a point of the curve of validation losses: on the same rows at every step. False if a signal came."""
    start = time.perf_counter()
    found, watch = self._measured(self.config.train.eval_sequences)
    logged = bool(found) and self._log_evaluation({'set': 'sample' if self._is_sample() else 'full', **found}, watch)
    self._row_time += time.perf_counter() - start  # evaluation is no step's time
    return logged

  def _evaluate_all(self) -> bool:
    """Logs the result of the run, on all rows; beside it the curve's last point, where that has been on a sample.

    False, and nothing in the log, if a signal came.
    """
    found, watch = self._measured(0)
    if found and self._is_sample() and self.config.train.eval_every:
      sample, _ = self._measured(self.config.train.eval_sequences)
      found = sample and {**found, 'sample': {key: one for key, one in sample.items() if key not in NOT_OF_A_SAMPLE}}
    return bool(found) and self._log_evaluation({'set': 'full', **found}, watch)

  def _is_sample(self):
    return len(self.rows['val'].spread(self.config.train.eval_sequences)) < len(self.rows['val'])

  def _measured(self, sequences) -> tuple[dict, experts.Watch]:
    """What `evaluate` finds, or {} if a signal came, and what became of single tokens.

    Raises UserError if the model has come to infinities.
    """
    rows = self.rows['val']
    watch = experts.Watch(rows, self.config.model, self.tokenizer)
    batch_size = evaluate.sequences_at_a_time(self.config, self.flat_mesh)
    count, weights = len(rows.spread(sequences)), self.weights()
    with progress(0, -(-count // batch_size), 'batch', 'evaluation', leave=False) as bar:

      def eval_step(*batch):
        if self.stop():
          raise _Stopped
        bar.update()
        return self.eval_step(*batch)

      try:
        found = evaluate.evaluate(eval_step, weights, rows, self.config, self.flat_mesh, sequences, watch)
      except _Stopped:
        return {}, watch
    for key, value in found.items():
      if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'step {self.done}: {key} = {value} in the evaluation: the weights of this step are no good')
    return found, watch

  def _log_evaluation(self, found: dict, watch: experts.Watch) -> bool:
    row = {'step': self.done, **found}
    if self.logbook:
      self.logbook.write('evals', row)
      watch.write(self.path, self.done, found['set'])
    for callback in self.callbacks:
      callback.evaluated(self, row)
    bits, vio = found['val_bits_per_byte'], found['max_vio_global']
    what = 'validation' if found['set'] == 'full' else 'sample of the validation text'
    shown = [f'{name}_global' for name, metric in balance_metrics.METRICS.items() if metric.shown and name != 'max_vio']
    more = ''.join(f', {key} {found[key]:.3g}' for key in shown)
    say(f'step {self.done}: {what} {bits:.3f} bits/byte, MaxVio_global {vio:.3f}{more}')
    return True

  def _record(self, done, out, bar):
    """Checks, counts and logs one step's metrics, once they are there."""
    out = jax.device_get(out)
    self.tokens += int(out.pop('batch_tokens'))
    load_LE, bias_LE = out.pop('load_LE'), out.pop('bias_LE', None)
    row = {key: float(value) for key, value in out.items()}
    if not (math.isfinite(row['total_loss']) and math.isfinite(row['grad_norm'])):
      last = self.checkpoints.latest()
      good = f'the last good checkpoint is step {last} in {self.checkpoints.path}' if last else 'no checkpoint yet'
      raise UserError(f'step {done}: loss {row["total_loss"]}, gradient norm {row["grad_norm"]}: not finite; {good}')
    if not (math.isfinite(row['bias_min']) and math.isfinite(row['bias_max'])):
      raise UserError(f'step {done}: bias rule {self.config.balance.bias_rule!r} gave a bias that is not finite')
    bar.set_postfix_str(f'loss {row["loss"]:.3f}', refresh=False)
    bar.update()
    last = done == self.config.train.steps
    if self.logbook and (last or _due(done, self._load_every)):
      self.logbook.write_loads(done, load_LE, bias_LE)
    if not (last or _due(done, self.config.train.log_every)):
      return
    now, steps = time.perf_counter(), done - self._row_step
    step_s = (now - self._row_time) / steps
    self._row_time, self._row_step = now, done
    tokens_per_s = self.config.train.batch_size * self.config.data.seq_len / step_s
    row |= {
      **balance_metrics.measured(load_LE, 'batch'),
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
    row |= {f'peak_gib/rank{rank}': size / 2**30 for rank, size in mesh.peak_memory(self.mesh).items()}
    row = {'step': done, **row}
    if self.logbook:
      self.logbook.write('metrics', row)
    for callback in self.callbacks:
      callback.logged(self, row)


class _Stopped(Exception):
  """A signal came between two batches of an evaluation."""


def say(text: str) -> None:
  """One line to the user, from the first process only."""
  if jax.process_index() == 0:
    _write(text)


def _write(text):
  tqdm.tqdm.write(text, file=sys.stderr)


def _due(done, every):
  return bool(every) and done % every == 0


def progress(done, total, unit='step', what=None, leave=True) -> tqdm.tqdm:
  """A bar on a terminal and a line now and then in a log, from the first process only.

  Args:
    done, total: units before the first, and in all.
    unit: what one is called.
    what: stands before the bar.
    leave: keep the bar when it is full.
  """
  quiet = not sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    initial=done,
    unit=unit,
    desc=what,
    leave=leave,
    dynamic_ncols=True,
    mininterval=15 if quiet else 0.2,  # a log file wants lines, not a moving bar
    disable=jax.process_index() > 0,
  )


@contextlib.contextmanager
def _stop_on_signal():
  """A function that says whether SIGTERM or Ctrl-C has come; all processes of a run get the same answer.

  A second Ctrl-C acts as usual. Outside of the main thread, where Python sets no handlers, no signal comes.
  """
  seen: list[int] = []
  handlers = {}

  def on_signal(number, frame):
    if number == signal.SIGINT and seen:
      signal.default_int_handler(number, frame)
    seen.append(number)

  def stop():
    if jax.process_count() == 1:
      return bool(seen)
    return bool(multihost_utils.process_allgather(np.array(bool(seen))).any())

  if threading.current_thread() is threading.main_thread():
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
