"""Safetensors, sharded: what a folder holds, one tensor at a time, and files written one at a time."""

import json
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from moe.errors import UserError

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
FLOATS = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
DTYPES = FLOATS | {'F8_E4M3': ml_dtypes.float8_e4m3fn, 'U8': np.uint8}  # numpy's safetensors cannot read all of them

NAMED = {'bfloat16': 'BF16', 'float32': 'F32'}  # what we write and compute in, as safetensors calls it


class Stored(NamedTuple):
  """A tensor in a file, not read yet. dtype: safetensors' name. start: first byte in the file."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  start: int

  def read(self) -> np.ndarray:
    """The values as stored, mapped from the file. Raises UserError if it cannot be read."""
    dtype = np.dtype(DTYPES[self.dtype])
    try:
      raw = np.memmap(self.file, np.uint8, 'r', self.start, (math.prod(self.shape) * dtype.itemsize,))
    except (OSError, ValueError) as error:
      raise UserError(f'cannot read {self.file}: {error}') from error
    return raw.view(dtype).reshape(self.shape)


def open_folder(folder: Path) -> dict[str, Stored]:
  """Every tensor of the checkpoint in `folder`, by name.

  Raises:
    UserError: no weights, a broken index, a file that is missing, truncated or holds other tensors than the index says.
  """
  if not (folder / INDEX).exists():
    if not (folder / SINGLE).exists():
      raise UserError(f'{folder} has no weights: neither {INDEX} nor {SINGLE}')
    return _open_file(folder / SINGLE)
  file_of = _read_index(folder)
  found = {}
  for name in sorted(set(file_of.values())):
    inside = _open_file(folder / name)
    for tensor in inside:
      if file_of.get(tensor) != name:
        raise UserError(f'{folder / name} holds {tensor}, which {INDEX} does not place there')
    found |= inside
  for tensor, name in file_of.items():
    if tensor not in found:
      raise UserError(f'{folder / name} lacks {tensor}, which {INDEX} places there')
  return found


def _read_index(folder):
  try:
    file_of = json.loads((folder / INDEX).read_text('utf-8'))['weight_map']
    inside = all(isinstance(name, str) and Path(name).name == name for name in file_of.values())
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'cannot read {folder / INDEX}: {type(error).__name__} {error}') from error
  if not inside:
    raise UserError(f'{folder / INDEX} names files outside of its folder')
  for name in sorted(set(file_of.values())):
    if not (folder / name).is_file():
      raise UserError(f'{folder / INDEX} names {name}, which is missing')
  return file_of


def _open_file(file):
  try:
    with safetensors.safe_open(file, 'numpy'):  # checks that header and length agree
      pass
    with file.open('rb') as stream:
      (length,) = struct.unpack('<Q', stream.read(8))
      header = json.loads(stream.read(length))
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(f'{file} is truncated or no safetensors file: {error}') from error
  header.pop('__metadata__', None)
  return {
    name: Stored(file, entry['dtype'], tuple(entry['shape']), 8 + length + entry['data_offsets'][0])
    for name, entry in header.items()
  }


def plan(sizes: list[int], most_bytes: float) -> list[list[int]]:
  """Consecutive indices into `sizes` (bytes of each tensor) per file of at most `most_bytes`, never an empty one."""
  files, filled = [[]], 0
  for index, size in enumerate(sizes):
    if files[-1] and filled + size > most_bytes:
      files.append([])
      filled = 0
    files[-1].append(index)
    filled += size
  return files


def holds(file: Path, expected: dict[str, tuple[str, tuple[int, ...]]]) -> bool:
  """Whether `file` is whole and holds tensors of these names, dtypes and shapes, and no others."""
  if not file.exists():
    return False
  try:
    found = _open_file(file)
  except UserError:
    return False
  return {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == expected


def write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
  """One safetensors file, which appears under its name once it is whole on the disk. Raises OSError if that refuses."""
  unfinished = file.with_name(f'{file.name}.unfinished')
  try:
    unfinished.touch()
    mode = unfinished.stat().st_mode
    save_file(tensors, unfinished, metadata={'format': 'pt'})  # transformers wants to know where a file is from
    unfinished.chmod(mode)  # safetensors makes files for their owner's eyes only
    with unfinished.open('rb+') as stream:
      os.fsync(stream.fileno())
    unfinished.rename(file)
  except safetensors.SafetensorError as error:
    raise OSError(str(error)) from error


def write_index(folder: Path, file_of: dict[str, str], total_bytes: int) -> None:
  """The list of which tensor is in which file."""
  index = {'metadata': {'total_size': total_bytes}, 'weight_map': file_of}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n', 'utf-8')
