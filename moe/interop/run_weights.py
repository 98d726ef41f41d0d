"""The weights of a run's newest checkpoint, a slice at a time: an export never holds the model.

Orbax restores whole arrays, and a stacked array of experts is a third of the model. Its files are zarr arrays in an
OCDBT store, which tensorstore, Orbax's own reader, slices. It decodes whole chunks: what one device held of an array.
"""

import functools
from pathlib import Path

import numpy as np
import tensorstore as ts

from moe.errors import UserError
from moe.interop.names import View
from moe.train.saved import Newest, check_files, read_meta


class RunWeights:
  """Parameters and 'bias_LE' by dotted path, on the disk."""

  def __init__(self, run: Path, shapes: dict[str, tuple[int, ...]]):
    """Opens the newest checkpoint of `run`, which must hold float32 arrays of these shapes and 'bias_LE'.

    The files of both are compared with their digests; `remarks` has lines for the user. A training that goes on does
    not delete the checkpoint while this object lives.

    Raises:
      UserError: no checkpoint, damaged, or of another model.
    """
    self._held = Newest(run)
    self.step, self.path = self._held.step, self._held.path
    self.remarks = check_files(self.path, read_meta(self.path), ('params', 'balance'))
    self._arrays = {name: self._open(name) for name in shapes}
    for name, shape in shapes.items():
      found = self._arrays[name]
      if (found.shape, found.dtype.name) != (shape, 'float32'):
        raise UserError(
          f'checkpoint {self.path} does not fit the model: {name} is {found.dtype.name} {list(found.shape)} there and '
          f'float32 {list(shape)} in this config'
        )

    self._piece = functools.lru_cache(maxsize=1)(self._read)

  def read(self, view: View) -> np.ndarray:
    """Values of a part of an array. Raises UserError if the checkpoint is damaged.

    The experts of a layer, which follow each other in an export, are read together: the checkpoint's chunks hold many.
    """
    if '.experts.' not in view.name:
      return self._read(view.name, view.place)
    *piece, expert = view.place
    return self._piece(view.name, tuple(piece))[expert]

  def _read(self, name, index):
    return self._or_damaged(lambda: self._arrays[name][index].read().result())

  def _open(self, name):
    item = 'balance' if name == 'bias_LE' else 'params'
    files = {'driver': 'ocdbt', 'base': f'file://{self.path / item}/', 'path': f'{name}/'}
    spec = {'driver': 'zarr', 'kvstore': files, 'fill_missing_data_reads': False}  # else lost chunks read as 0
    header = self._or_damaged(lambda: ts.KvStore.open(files).result().read('.zarray').result())
    if header.state == 'missing':
      raise UserError(f'checkpoint {self.path} does not fit the model: {name} is missing there')
    return self._or_damaged(lambda: ts.open(spec, open=True, read=True).result())

  def _or_damaged(self, action):
    try:
      return action()
    except ValueError as error:
      raise UserError(f'checkpoint {self.path} is damaged: {str(error).splitlines()[0][:300]}') from error
