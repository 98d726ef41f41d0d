"""A run's newest checkpoint as a folder that transformers, vLLM and SGLang load."""

import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import tokenizers
import tqdm
from jax.sharding import SingleDeviceSharding

from moe.checkpoint import Checkpoints, flatten
from moe.config import Config, from_config_dict
from moe.data.tokenizer import ByteTokenizer, Tokenizer, load_saved
from moe.errors import UserError
from moe.interop import hf_config, names, shards
from moe.interop.folder import new_folder
from moe.model import transformer
from moe.state import TrainState

DTYPES = {'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float32': np.dtype(np.float32)}


def export_run(run: Path, target: Path, dtype: str = 'bfloat16', max_shard_gb: float = 5.0) -> list[str]:
  """Writes the newest checkpoint of `run` to the new folder `target`. Returns lines for the user.

  Args:
    run: run directory.
    target: folder to make.
    dtype: of the weights, a key of DTYPES; the router bias is float32 in any case.
    max_shard_gb: the most a file holds, in 1e9 bytes; a larger tensor gets a file of its own.

  Raises:
    UserError: no run or no checkpoint there, a model the format cannot represent, target exists, disk full.
  """
  if dtype not in DTYPES:
    raise UserError(f'dtype {dtype!r} must be one of {", ".join(DTYPES)}')
  if not 0 < max_shard_gb < math.inf:
    raise UserError(f'max_shard_gb = {max_shard_gb} must be above 0')
  config, tokenizer = _read_settings(run), _read_tokenizer(run)
  hf = hf_config.to_hf(config, dtype, tokenizer.bos_id if tokenizer else None)
  with new_folder(target) as folder:
    arrays, step = read_weights(run, config)
    files, total_bytes = write_weights(folder, config, arrays, dtype, max_shard_gb)
    (folder / 'config.json').write_text(json.dumps(hf, indent=2) + '\n', 'utf-8')
    lines = [f'{target}: step {step} of {run}, {total_bytes:,} bytes of {dtype}, files: {files}']
    return [*lines, *_write_tokenizer(folder, run, tokenizer)]


def read_weights(run: Path, config: Config) -> tuple[dict[str, np.ndarray], int]:
  """Parameters and 'bias_LE' of the newest checkpoint by dotted path, in host memory, and its step."""
  bias_shape = (config.model.num_routers, config.model.num_experts)
  weights = transformer.abstract_params(config), {'bias_LE': jax.ShapeDtypeStruct(bias_shape, np.float32)}
  host = SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
  params, balance = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), weights)
  checkpoints = Checkpoints(run)
  try:
    restored = checkpoints.restore_weights(TrainState((), params, balance, ()))
    step = checkpoints.latest()
  finally:
    checkpoints.close()
  arrays = flatten(restored.params) | {'bias_LE': restored.balance['bias_LE']}
  return {name: np.asarray(array) for name, array in arrays.items()}, step


def write_weights(folder: Path, config: Config, arrays, dtype: str, max_shard_gb: float) -> tuple[int, int]:
  """Writes the tensors, one file at a time, and their index. Returns the numbers of files and of bytes."""
  tensors = names.table(config.model) + names.copies(config.model)
  shapes = {name: array.shape for name, array in arrays.items()}
  sizes = [math.prod(tensor.shape(shapes)) * _dtype(tensor, dtype).itemsize for tensor in tensors]
  files, file_of = shards.plan(sizes, max_shard_gb * 1e9), {}
  _check_space(folder, sum(sizes))
  for number, indices in enumerate(tqdm.tqdm(files, 'writing', unit='file', disable=None), 1):
    name = f'model-{number:05d}-of-{len(files):05d}.safetensors'
    inside = [tensors[index] for index in indices]
    shards.write_file(folder / name, {t.name: t.pack(arrays).astype(_dtype(t, dtype), copy=False) for t in inside})
    file_of |= {tensor.name: name for tensor in inside}
  shards.write_index(folder, file_of, sum(sizes))
  return len(files), sum(sizes)


def _dtype(tensor, dtype):
  return DTYPES['float32' if tensor.is_bias else dtype]


def _check_space(folder, needed):
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise UserError(f'the export needs {needed:,} bytes and the disk of {folder.parent} has {free:,} free')


def _read_settings(run) -> Config:
  file = run / 'config.json'
  if not file.is_file() or not (run / 'checkpoints').is_dir():
    raise UserError(f'{run} is not a run directory with config.json and checkpoints')
  try:
    return from_config_dict(json.loads(file.read_text('utf-8'))['config'])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'cannot read {file} as the config of a run: {type(error).__name__} {error}') from error


def _read_tokenizer(run) -> Tokenizer | None:
  return load_saved(run / 'tokenizer.json') if (run / 'tokenizer.json').exists() else None


def _write_tokenizer(folder, run, tokenizer) -> list[str]:
  if tokenizer is None:
    return [f'no tokenizer.json: {run} has none']
  if isinstance(tokenizer, ByteTokenizer):
    return ['no tokenizer.json: this run reads bytes (ids 0..255, 256 starts a document)']
  shutil.copyfile(run / 'tokenizer.json', folder / 'tokenizer.json')
  bos_token = tokenizers.Tokenizer.from_file(str(run / 'tokenizer.json')).id_to_token(tokenizer.bos_id)
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos_token, 'eos_token': bos_token}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings, indent=2) + '\n', 'utf-8')
  return []
