"""Safetensors, sharded: what a folder holds, one tensor at a time, and files written one at a time."""

import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from moe.errors import UserError, short
from moe.files import parse_json, read_json

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
FLOATS = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
EXPONENT = 'F8_E8M0'  # a power of two, in newer files the dtype of scales
# Numpy's safetensors cannot read all of them.
DTYPES = FLOATS | {'F8_E4M3': ml_dtypes.float8_e4m3fn, EXPONENT: ml_dtypes.float8_e8m0fnu, 'U8': np.uint8}

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
  """Every tensor of the checkpoint in `folder`, by name; where there is an index, those that it names, where it says.

  Raises:
    UserError: no weights, a broken index, a file that is missing, truncated or lacks a tensor of the index.
  """
  if not os.path.lexists(folder / INDEX):
    if not os.path.lexists(folder / SINGLE):
      raise UserError(f'{folder} has no weights: neither {INDEX} nor {SINGLE}')
    return _open_file(folder / SINGLE)
  file_of = _read_index(folder)
  found: dict[str, Stored] = {}
  for name in sorted(set(file_of.values())):
    inside = _open_file(folder / name)
    found |= {tensor: stored for tensor, stored in inside.items() if file_of.get(tensor) == name}  # not a stale copy
  for tensor, name in file_of.items():
    if tensor not in found:
      raise UserError(f'{folder / name} lacks {tensor[:100]}, which {INDEX} places there')
  return found


def _read_index(folder):
  file_of = read_json(folder / INDEX).get('weight_map')
  if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
    raise UserError(f'cannot read {folder / INDEX}: its weight_map is {short(file_of)}, not file names by tensor')
  for name in sorted(set(file_of.values())):
    if Path(name).name != name:
      raise UserError(f'{folder / INDEX} names files outside of its folder: {name[:100]}')
    if not os.path.isfile(folder / name):
      raise UserError(f'{folder / INDEX} names {name[:100]}, which is missing')
  return file_of


def _open_file(file):
  try:
    if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe may never end
      raise UserError(f'{file} is not a regular file')
    with safetensors.safe_open(file, 'numpy'):  # checks that header, which has a most length, and file agree
      pass
    with file.open('rb') as stream:
      (length,) = struct.unpack('<Q', stream.read(8))
      header = parse_json(stream.read(length), f'header of {file}')
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(f'{file} is truncated or no safetensors file: {str(error)[:160]}') from error
  header.pop('__metadata__', None)
  return {
    name: Stored(file, entry['dtype'], tuple(entry['shape']), 8 + length + entry['data_offsets'][0])
    for name, entry in header.items()
  }


def plan(sizes: list[int], most_bytes: float) -> list[list[int]]:
  """Consecutive indices into `sizes` (bytes of each tensor) per file of at most `most_bytes`, never an empty one."""
  files: list[list[int]] = [[]]
  filled = 0
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
