"""One checkpoint on the disk, read by anyone: what it must hold, whether it is as it was written, and its arrays."""

import contextlib
import fcntl
import math
import os
import pathlib
import re
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.errors import UserError, out_of_memory
from moe.files import MAX_JSON_BYTES, digests, read_json, regular

FORMAT = 'moe-lossfree-1'
ARRAY_ITEMS = ('params', 'balance', 'optimizer')
ITEMS = (*ARRAY_ITEMS, 'meta')
META = 'meta/metadata'
OF_ORBAX = '_CHECKPOINT_METADATA'  # of no item; Orbax writes it again after the digests
MESSAGE_BYTES = 2048


class Damaged(UserError):
  """A checkpoint that is not what was written under its name; the one before it may be whole."""


def folder_of(run_dir: pathlib.Path) -> pathlib.Path:
  """Where a run has its checkpoints."""
  return (pathlib.Path(run_dir) / 'checkpoints').absolute()


def steps(folder: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, in any order. Raises UserError if it cannot be read."""
  try:
    return [int(path.name) for path in folder.iterdir() if re.fullmatch('0|[1-9][0-9]*', path.name) and path.is_dir()]
  except OSError as error:
    raise UserError(f'cannot read {folder}: {error.strerror}') from error


class Newest:
  """The newest checkpoint of a run. While this object lives, a training that goes on does not delete it.

  path: its folder. step: its number, the same on all processes.
  """

  def __init__(self, run_dir: pathlib.Path):
    """Raises UserError if there is none."""
    folder = folder_of(run_dir)
    if jax.process_index() == 0:
      self.step = self._hold_newest(folder)
    if jax.process_count() > 1:
      self.step = int(multihost_utils.broadcast_one_to_all(np.int32(self.step if jax.process_index() == 0 else 0)))
    if self.step < 0:
      raise UserError(f'{folder} holds no checkpoint')
    self.path = folder / str(self.step)

  def _hold_newest(self, folder):
    while (step := max(steps(folder), default=-1)) >= 0:
      try:
        descriptor = os.open(folder / str(step) / META, os.O_RDONLY | os.O_NONBLOCK)  # should it be a pipe
      except OSError:
        if (folder / str(step)).is_dir():
          return step  # damaged, as `read` will find
        continue  # deleted since: there is a newer one
      weakref.finalize(self, os.close, descriptor)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
      except OSError:  # a file system without locks: whoever reads notices that the folder is gone
        return step
      if (folder / str(step)).is_dir():
        return step
    return -1


@contextlib.contextmanager
def taken(folder: pathlib.Path) -> Iterator[bool]:
  """Whether no `Newest` holds the checkpoint in `folder`; during the block none can begin to."""
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(folder / META, 'rb+'))  # NFS wants it writable
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      free = True
    except OSError as error:  # no such file, or a file system without locks: it is free
      free = not isinstance(error, BlockingIOError)
    yield free


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
  """The meta of the checkpoint in `folder`, whose name is its step.

  Raises:
    Damaged: unreadable, or a field is missing or wrong.
    UserError: of another program.
  """
  try:
    meta = read_json(folder / META)
  except UserError as error:
    raise Damaged(f'checkpoint {folder} is damaged or foreign: {error}') from error
  if meta.get('format') != FORMAT:
    altered = (folder / digests.FILE).exists() and digests.damage(folder, ['meta'])
    kind = Damaged if altered else UserError
    raise kind(f'checkpoint {folder} is not of this program: format {str(meta.get("format"))[:40]!r}, not {FORMAT!r}')
  data, step, count = meta.get('data', {}), int(folder.name), lambda value: type(value) is int and value >= 0
  epochs = lambda value: type(value) in (int, float) and 0 <= value < math.inf
  wanted = {
    'step': (meta.get('step') == step and count(meta['step']), f'{step}, as the folder'),
    'tokens': (count(meta.get('tokens')), 'a number of tokens'),
    'seed': (type(meta.get('seed', 0)) is int, 'an integer'),
    'data': (
      isinstance(data, dict) and data.get('next_batch', step) == step and epochs(data.get('epoch', 0)),
      f'next_batch {step} and a number of epochs',
    ),
    'logged': (
      meta.get('logged') is None or (isinstance(meta['logged'], dict) and all(map(count, meta['logged'].values()))),
      'the bytes of each file of rows',
    ),
    'digests': (meta.get('digests', digests.FILE) == digests.FILE, repr(digests.FILE)),
  }
  for name, (right, valid) in wanted.items():
    if not right:
      found = repr(meta.get(name))[:60]
      raise Damaged(f'checkpoint {folder} is damaged or foreign: {name} in its meta is {found}, not {valid}')
  return meta


def check_files(folder: pathlib.Path, meta: dict[str, Any], items: tuple[str, ...]) -> list[str]:
  """Compares the files of some items with their digests; each process of a run reads its share. Returns remarks.

  Raises:
    Damaged: naming a file that is not as it was written.
  """
  try:
    if os.path.lexists(folder / OF_ORBAX):
      regular(folder / OF_ORBAX, MAX_JSON_BYTES)
  except UserError as error:
    raise Damaged(f'checkpoint {folder} is damaged: {error}') from error
  if 'digests' not in meta and not (folder / digests.FILE).exists():  # of an earlier version, which wrote none
    return [f'checkpoint {folder} has no digests, being of an earlier version: damage to it may go unnoticed']
  if why := digests.damage(folder, (*items, 'meta'), (jax.process_index(), jax.process_count())):
    raise Damaged(f'checkpoint {folder} is damaged: {why}')
  return []


def read(folder: pathlib.Path, parts: dict[str, Any], exact: bool) -> tuple[dict, dict, list[str]]:
  """(meta, items, remarks) of the checkpoint in `folder`; its files are checked before Orbax reads them.

  Args:
    parts: for each item wanted a tree of arrays or ShapeDtypeStructs with shardings; Orbax reads no other item.
    exact: an array of an item that is not in `parts` is an error.

  Raises:
    Damaged, UserError: as `read_meta` and `check_files`; on every process, if on one. UserError: of another model.
  """
  meta = _agreed(lambda: read_meta(folder))
  remarks = _agreed(lambda: check_files(folder, meta, tuple(parts)))
  items, casts = _agreed(lambda: _read_arrays(folder, parts, exact))
  return meta, items, remarks + casts


def _agreed(action):
  """What `action` returns, or on every process the first error that it raised on one."""
  try:
    result, why = action(), None
  except UserError as error:
    result, why = None, error
  if jax.process_count() > 1:
    mine = f'{type(why) is Damaged:d}{why}'.encode()[:MESSAGE_BYTES] if why else b''
    texts = multihost_utils.process_allgather(np.frombuffer(mine.ljust(MESSAGE_BYTES, b'\0'), np.uint8))
    text = next((bytes(row).rstrip(b'\0').decode(errors='replace') for row in texts if row.any()), '')
    why = (Damaged if text[0] == '1' else UserError)(text[1:]) if text else None
  if why:
    raise why
  return result


def _read_arrays(folder, parts, exact):
  reader, remarks = ocp.Checkpointer(handler()), []
  try:
    found = reader.metadata(folder)
    found = {name: getattr(found, 'item_metadata', found)[name].tree for name in parts}
    targets, names = {}, {}
    for name, part in parts.items():
      wanted = flatten(part)
      names[name] = _stored_names(wanted, found[name])
      wanted = {names[name][key]: leaf for key, leaf in wanted.items()}
      remarks += _compare(folder / name, found[name], wanted, exact)
      targets[name] = ocp.args.StandardRestore(_with_the_rest(wanted, found[name]))
    items = reader.restore(folder, args=ocp.args.Composite(**targets))
  except UserError:
    raise
  except Exception as error:  # Orbax and tensorstore raise a dozen kinds for a damaged file
    if out_of_memory(error):
      raise UserError(f'there is not enough memory for checkpoint {folder} ({first_line(error)})') from error
    raise Damaged(f'checkpoint {folder} is damaged or foreign ({first_line(error)})') from error
  finally:
    reader.close()
  return {name: _unflatten(items[name], part, names[name]) for name, part in parts.items()}, remarks


def handler() -> ocp.CompositeCheckpointHandler:
  """How the items of a checkpoint are written and read."""
  arrays = {name: ocp.StandardCheckpointHandler() for name in ARRAY_ITEMS}
  return ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), **arrays)


def _stored_names(wanted, found):
  """What the file calls each array: a version that had no clipping in the chain of the optimizer counted one less."""
  shifted = 'state.0.count' in found and 'state.1.count' in wanted
  number = lambda match: f'state.{int(match[1]) - 1}.'
  return {name: re.sub(r'^state\.(\d+)\.', number, name) if shifted else name for name in wanted}


def _compare(where, found, wanted, exact):
  """Remarks. Orbax casts silently and may pass over missing keys, so names, shapes and dtypes are compared first."""
  if where.name == 'optimizer' and exact and found.keys() == {'step'} != wanted.keys():
    raise UserError(f'checkpoint {where.parent} has weights only, as imports do; train.init_from starts a run from it')
  casts = set()
  for name in sorted(wanted.keys() | (found.keys() if exact else set())):
    there, here = (
      (tuple(tree[name].shape), str(tree[name].dtype)) if name in tree else 'missing' for tree in (found, wanted)
    )
    if where.name == 'optimizer' and there[0] == here[0] and {there[1], here[1]} == {'float32', 'bfloat16'}:
      casts.add(f'the optimizer continues with moments in {here[1]}, cast from {there[1]} of the checkpoint')
    elif there != here:
      raise UserError(f'checkpoint {where} does not fit the model: {name} is {there} there and {here} in this config')
  return sorted(casts)


def _with_the_rest(wanted, found):
  """`wanted`, and what else the item holds, as Orbax restores an item as a whole: replicated like the first wanted."""
  anywhere = next(iter(wanted.values())).sharding
  replicated = NamedSharding(anywhere.mesh, P()) if isinstance(anywhere, NamedSharding) else anywhere
  rest = {name: leaf for name, leaf in found.items() if name not in wanted}
  return wanted | {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated) for name, leaf in rest.items()
  }


def flatten(tree) -> dict[str, Any]:
  """Leaves by dotted path, such as 'layers.experts.w_up_eDF'."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _unflatten(flat, like, names):
  return jax.tree.map_with_path(lambda path, _: flat[names[_name(path)]], like)


def _name(path):
  return '.'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', '')))) for key in path)


def first_line(error: Exception) -> str:
  """The first line of what an exception says, at most 200 characters."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200]
