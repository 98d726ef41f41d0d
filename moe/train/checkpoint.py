"""Checkpoints with Orbax: written in the background, whole or not at all, checked when read, restorable on any mesh.

One checkpoint is a folder CHECKPOINTS/STEP with the items `params`, `balance` (router bias and what its rule
remembers), `optimizer`, each a flat dict from dotted names to arrays, and `meta`: format, step, position in the data,
seed. The order of batches and every random draw are pure functions of (seed, step), so these two numbers are the state
of both. `digests.json` is written and all is synced before the folder takes its name, so a folder with that name is
complete; `saved.py` reads.
"""

import functools
import pathlib
import shutil
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from moe.balance import rules
from moe.config import BalanceConfig
from moe.errors import UserError
from moe.files import digests, sync_folder
from moe.train import saved
from moe.train.run_dir import read_config
from moe.train.saved import FORMAT, Damaged, flatten
from moe.train.state import TrainState, Weights

UNFINISHED, DELETED, ASIDE = '.orbax-checkpoint-tmp', '.deleted', '.damaged'  # what may follow a step in a name
State = TypeVar('State', TrainState, Weights)


class Restored(NamedTuple, Generic[State]):
  """state: laid out as asked for. meta: of the checkpoint. remarks: lines for the user."""

  state: State
  meta: dict[str, Any]
  remarks: list[str]


class Checkpoints:
  """The checkpoints of one run directory, for the one run that writes them; others use `restore_weights`."""

  def __init__(self, run_dir: pathlib.Path, keep: int = 1):
    """Opens RUN_DIR/checkpoints, made if need be, and sweeps what a killed run left unfinished there.

    Args:
      keep: newest checkpoints kept; the one before them goes when the next is begun.

    Raises:
      UserError: it cannot be made or written.
    """
    self.path, self._keep, self._writing = saved.folder_of(run_dir), keep, None
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        for path in self.path.iterdir():
          if UNFINISHED in path.name or path.name.endswith(DELETED):
            shutil.rmtree(path)
    except OSError as error:
      raise UserError(f'cannot use {self.path} as the folder of checkpoints: {error.strerror}') from error
    options = ocp.AsyncOptions(post_finalization_callback=self._seal)
    self._writer = ocp.AsyncCheckpointer(saved.handler(), async_options=options)
    self._saved = self.latest()

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return max(saved.steps(self.path), default=None)

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts writing `state`; its arrays may be donated as soon as this returns. No-op if that step is saved.

    Raises:
      UserError: this or the previous write failed (disk full, not writable).
    """
    step = meta['step']
    if step == self._saved:
      return
    self.wait()
    self._check_space(state)
    items = {name: _save_args(flatten(part)) for name, part in _parts(state).items()}
    meta = {'format': FORMAT, 'digests': digests.FILE} | meta
    args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
    self._writing = step
    self._guard(lambda: self._writer.save(self.path / str(step), args=args))
    self._saved = step

  def wait(self) -> None:
    """Returns once everything saved is on disk, and old ones are gone. Raises UserError if a write failed."""
    self._guard(self._writer.wait_until_finished)
    if jax.process_index() == 0:
      self._guard(self._prune)

  def close(self) -> None:
    self._guard(self._writer.close)

  def restore(self, step: int, like: TrainState) -> Restored[TrainState]:
    """The checkpoint of `step`, laid out as `like` (shapes, dtypes and shardings; see `abstract_like`).

    Moments are cast to the dtype of `like`, and a remark says so.

    Raises:
      Damaged: its files are not as they were written, or do not belong to that step.
      UserError: of another program or another model.
    """
    folder = self.path / str(step)
    meta, items, remarks = saved.read(folder, _parts(like), exact=True)
    found = items['optimizer']['step']
    if int(found) != step:
      raise Damaged(f'checkpoint {folder} is damaged or foreign: the state in it is of step {int(found)}')
    return Restored(_joined(like, items), meta, remarks)

  def restore_newest(self, like: TrainState) -> Restored[TrainState] | None:
    """The newest checkpoint that is not damaged, as `restore` gives it, or None if there is none at all.

    Damaged ones after it are renamed to STEP.damaged and named in the remarks; they go when a later one is saved.

    Raises:
      UserError: all are damaged, or one is of another program or another model.
    """
    damaged = {}
    for step in sorted(saved.steps(self.path), reverse=True):
      try:
        found = self.restore(step, like)
      except Damaged as error:
        damaged[step] = error
        continue
      self._saved = step
      return found._replace(remarks=[*self._set_aside(damaged, step), *found.remarks])
    for first in damaged.values():
      raise UserError(f'{first}; none before it is whole: restore one from a copy, or choose another workdir')
    return None

  def _set_aside(self, damaged, step):
    for number in damaged if jax.process_index() == 0 else ():
      old = self.path / f'{number}{ASIDE}'
      self._guard(lambda old=old: shutil.rmtree(old) if old.exists() else None)
      self._guard(lambda number=number, old=old: (self.path / str(number)).rename(old))
    back = f'going back to step {step}'
    return [f'{error}; {back}, and {number} is now {number}{ASIDE}' for number, error in damaged.items()]

  def _seal(self):
    """In Orbax's thread of the first process, when all have written their files and before the folder is renamed."""
    (folder,) = self.path.glob(f'{self._writing}{UNFINISHED}*')
    digests.write(folder, saved.ITEMS)

  def _prune(self):
    sync_folder(self.path)  # the newest must have its name before an older one goes
    steps = sorted(saved.steps(self.path))
    for step in steps[: -self._keep]:
      gone = self.path / f'{step}{DELETED}'
      with saved.taken(self.path / str(step)) as free:
        if free:
          (self.path / str(step)).rename(gone)  # so that half of it is never taken for a checkpoint
      if free:  # else whoever reads it has it until the next time
        shutil.rmtree(gone)
    for path in self.path.glob(f'*{ASIDE}'):
      if steps and path.stem.isdecimal() and int(path.stem) <= steps[-1]:
        shutil.rmtree(path)

  def _check_space(self, state):
    # Said before writing: once the background write fails, it does so with a traceback per array.
    shards = (shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.replica_id == 0)
    needed, free = sum(shard.data.nbytes for shard in shards), shutil.disk_usage(self.path).free
    if free < needed:
      raise UserError(
        f'cannot write a checkpoint to {self.path}: it needs {needed:,} bytes and the disk has {free:,} free; '
        + self._last_complete()
      )

  def _last_complete(self):
    last = self.latest()
    return f'step {last} is the last complete checkpoint' if last is not None else 'there is no complete checkpoint'

  def _guard(self, action):
    try:
      return action()
    except Exception as error:  # disk full comes as OSError, ValueError or a tensorstore status
      why = f'cannot write a checkpoint to {self.path} ({saved.first_line(error)}); {self._last_complete()}'
      raise UserError(why) from error


def restore_weights(run_dir: pathlib.Path, like: State) -> Restored[State]:
  """`like` with the parameters and the entries of `balance` that it has, of a run's newest checkpoint.

  Nothing else is read or checked. The run may be training: what is being read is not deleted meanwhile.

  Raises:
    UserError: no checkpoint, damaged, or of another model.
  """
  while True:
    held = saved.Newest(run_dir)
    try:
      meta, items, remarks = saved.read(held.path, {'params': like.params, 'balance': like.balance}, exact=False)
      return Restored(like._replace(params=items['params'], balance=items['balance']), meta, remarks)
    except Damaged:
      if held.path.exists():  # else it was replaced by a newer one, on a disk without locks
        raise


def start_from(source: pathlib.Path, balance: BalanceConfig, fresh: TrainState) -> Restored[TrainState]:
  """`fresh` with weights and bias of another run's newest checkpoint, and all that a rule like ours remembers there.

  Args:
    source: that run's directory.
    balance: of the run that starts; `balance.rules` says what its rule makes of another rule's bias.

  Raises:
    UserError: no run there, one whose bias means something else, or as `restore_weights`.
  """
  if not (source / 'checkpoints').is_dir():
    raise UserError(f'config train.init_from = {str(source)!r} is not a run directory with checkpoints')
  theirs = read_config(source).balance.bias_rule
  rules.check_start(balance.bias_rule, theirs)
  if theirs == balance.bias_rule:
    return restore_weights(source, fresh)
  found = restore_weights(source, fresh._replace(balance={'bias_LE': fresh.balance['bias_LE']}))
  laid_out = jax.tree.map(lambda leaf: leaf.sharding, fresh.balance)
  start = jax.jit(functools.partial(rules.start, balance), out_shardings=laid_out)
  return found._replace(state=found.state._replace(balance=start(found.state.balance['bias_LE'])))


def _save_args(flat):
  """Stacked layers in a chunk each: whoever reads one layer, such as an export, need not decode all."""
  by_layer = {
    name: ocp.SaveArgs(shard_axes=(0,) if 'layers.' in name and leaf.ndim else ()) for name, leaf in flat.items()
  }
  return ocp.args.StandardSave(flat, save_args=by_layer)


def abstract_like(state: TrainState, shardings: TrainState) -> TrainState:
  """Shapes and dtypes of `state` with `shardings`, as `Checkpoints.restore` wants them."""
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def _parts(state: TrainState):
  optimizer = {'step': state.step, 'state': state.opt_state}
  return {'params': state.params, 'balance': state.balance, 'optimizer': optimizer}


def _joined(like, items):
  optimizer = items['optimizer']
  return like._replace(
    step=optimizer['step'], params=items['params'], balance=items['balance'], opt_state=optimizer['state']
  )
