"""Checkpoints with Orbax: written in the background, whole or not at all, restorable on any mesh.

One checkpoint holds the items `params`, `balance` (router bias and what its rule remembers), `optimizer`, each a flat
dict from dotted names to arrays, and `meta`: format, step, position in the data, seed. The order of batches and
every random draw are pure functions of (seed, step), so these two numbers are the state of both.
"""

import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.errors import UserError
from moe.state import TrainState

FORMAT = 'moe-lossfree-1'
ARRAY_ITEMS = ('params', 'balance', 'optimizer')


class Checkpoints:
  """The checkpoints of one run directory."""

  def __init__(self, run_dir: pathlib.Path, keep: int = 1):
    """Opens RUN_DIR/checkpoints, keeping the newest `keep`. Raises UserError if it cannot be made."""
    self.path = (pathlib.Path(run_dir) / 'checkpoints').absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    handlers = {name: ocp.StandardCheckpointHandler() for name in ARRAY_ITEMS} | {'meta': ocp.JsonCheckpointHandler()}
    try:
      self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)
    except OSError as error:
      raise UserError(f'cannot use {self.path}: {error.strerror}') from error
    self._saved = self.latest()

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts writing `state`; its arrays may be donated as soon as this returns. No-op if that step is saved.

    Raises:
      UserError: this or the previous write failed (disk full, not writable).
    """
    step = meta['step']
    if step == self._saved:
      return
    self._check_space(state)
    items = {name: _save_args(flatten(part)) for name, part in _parts(state).items()}
    meta = {'format': FORMAT} | meta
    self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)))
    self._saved = step

  def wait(self) -> None:
    """Returns once everything saved is on disk. Raises UserError if a write failed."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    self._guard(self._manager.close)

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """State and meta of `step`, laid out as `like` (shapes, dtypes and shardings; see `abstract_like`).

    Raises:
      UserError: damaged, of another program or another model.
    """
    parts = _parts(like)
    meta, items = self._read(step, parts)
    return _joined(like, items), meta

  def restore_weights(self, like: TrainState) -> TrainState:
    """`like` with parameters and router bias of the newest checkpoint; Orbax reads nothing else.

    Raises:
      UserError: no checkpoint, damaged, or another model.
    """
    step = self.latest()
    if step is None:
      raise UserError(f'{self.path} holds no checkpoint')
    wanted = {'params': like.params, 'balance': {'bias_LE': like.balance['bias_LE']}}
    _, items = self._read(step, wanted, exact=False)
    return like._replace(params=items['params'], balance=like.balance | items['balance'])

  def _read(self, step, parts, exact=True):
    where = self.path / str(step)
    advice = 'delete that folder to continue from the checkpoint before it, or choose another workdir'
    try:
      meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
      if meta.get('format') != FORMAT:
        raise UserError(f'checkpoint {where} is not of this program: format {meta.get("format")!r}, not {FORMAT!r}')
      found = self._manager.item_metadata(step)
      for name, part in parts.items():
        _compare(where / name, found[name].tree, flatten(part), exact)
      args = {
        name: ocp.args.StandardRestore(_with_the_rest(flatten(part), found[name].tree)) for name, part in parts.items()
      }
      items = self._manager.restore(step, args=ocp.args.Composite(**args))
    except UserError:
      raise
    except Exception as error:  # Orbax and tensorstore raise a dozen kinds for a damaged file
      raise UserError(f'checkpoint {where} is damaged or foreign ({_first_line(error)}); {advice}') from error
    return meta, {name: _unflatten(items[name], part) for name, part in parts.items()}

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
    last = self._manager.latest_step()
    return f'step {last} is the last complete checkpoint' if last is not None else 'there is no complete checkpoint'

  def _guard(self, action):
    try:
      return action()
    except Exception as error:  # disk full comes as OSError, ValueError or a tensorstore status
      why = f'cannot write a checkpoint to {self.path} ({_first_line(error)}); {self._last_complete()}'
      raise UserError(why) from error


def _save_args(flat):
  """Stacked layers in a chunk each: whoever reads one layer, such as an export, need not decode all."""
  by_layer = {
    name: ocp.SaveArgs(shard_axes=(0,) if 'layers.' in name and leaf.ndim else ()) for name, leaf in flat.items()
  }
  return ocp.args.StandardSave(flat, save_args=by_layer)


def _with_the_rest(wanted, found):
  """`wanted`, and what else the item holds, as Orbax restores an item as a whole: replicated like the first wanted."""
  anywhere = next(iter(wanted.values())).sharding
  replicated = NamedSharding(anywhere.mesh, P()) if isinstance(anywhere, NamedSharding) else anywhere
  rest = {name: leaf for name, leaf in found.items() if name not in wanted}
  return wanted | {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated) for name, leaf in rest.items()
  }


def abstract_like(state: TrainState, shardings: TrainState) -> TrainState:
  """Shapes and dtypes of `state` with `shardings`, as `Checkpoints.restore` wants them."""
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def flatten(tree) -> dict[str, Any]:
  """Leaves by dotted path, such as 'layers.experts.w_up_eDF'."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _unflatten(flat, like):
  return jax.tree.map_with_path(lambda path, _: flat[_name(path)], like)


def _name(path):
  return '.'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', '')))) for key in path)


def _parts(state: TrainState):
  return {'params': state.params, 'balance': state.balance, 'optimizer': {'step': state.step, 'state': state.opt_state}}


def _joined(like, items):
  optimizer = items['optimizer']
  return like._replace(
    step=optimizer['step'], params=items['params'], balance=items['balance'], opt_state=optimizer['state']
  )


def _compare(where, found, wanted, exact):
  """Orbax casts silently and may pass over missing keys, so names, shapes and dtypes are compared first."""
  found = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in found.items()}
  wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
  for name in sorted(wanted.keys() | (found.keys() if exact else set())):
    if found.get(name) != wanted.get(name):
      raise UserError(
        f'checkpoint {where} does not fit the model: {name} is {found.get(name, "missing")} there and '
        f'{wanted.get(name, "missing")} in this config'
      )


def _first_line(error):
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:300]
