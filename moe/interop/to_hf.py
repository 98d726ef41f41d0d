"""A run's newest checkpoint as a folder that transformers, vLLM and SGLang load."""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import tqdm

from moe.config import Config
from moe.data import folder_tokens
from moe.data.tokenizer import FILE, ByteTokenizer, Tokenizer, load_saved
from moe.errors import UserError
from moe.files import digests
from moe.files.folder import LOCK, PLAN, new_folder
from moe.interop import formats, hf_config, names, shards
from moe.interop.load import array_shapes
from moe.interop.run_sizes import check_layers
from moe.interop.run_weights import RunWeights
from moe.train.run_dir import read_config


def export_run(
  run: Path, target: Path, dtype: str = 'bfloat16', max_shard_gb: float = 5.0, quantize: str | None = None
) -> list[str]:
  """Writes the newest checkpoint of `run` to the new folder `target`. Returns lines for the user.

  Holds one file and one layer's experts in memory. If it is killed, the same call keeps the files that are whole.

  Args:
    run: run directory.
    target: folder to make.
    dtype: of the weights, 'bfloat16' or 'float32'; the router bias is float32 in any case.
    max_shard_gb: the most a file holds, in 1e9 bytes; a larger tensor gets a file of its own.
    quantize: 'fp8' or 'mxfp4', for the weights that `formats.kind_for` says, or None.

  Raises:
    UserError: no run or no checkpoint there, a model the format cannot represent, target exists, disk full.
  """
  for name, value, valid in (('dtype', dtype, shards.NAMED), ('quantize', quantize, (None, *formats.PARTS))):
    if value not in valid:
      raise UserError(f'{name} {value!r} must be one of {", ".join(str(one) for one in valid)}')
  if not 0 < max_shard_gb < math.inf:
    raise UserError(f'max_shard_gb = {max_shard_gb} must be above 0')
  config, tokenizer, said = read_config(run), _read_tokenizer(run), folder_tokens.read(run)
  if target.resolve() == (run / folder_tokens.KEPT).resolve():
    raise UserError(f'{target} is where a run keeps its tokenizer; export it to another folder')
  check_layers(run, config.model)
  bos_id, kept = tokenizer.bos_id if tokenizer else None, _kept_fields(run, config, said)
  hf = hf_config.to_hf(config, dtype, bos_id, quantize, kept)
  weights = RunWeights(run, array_shapes(config.model))
  if hf['model_type'] == hf_config.V2 and weights.read(names.View('bias_LE')).any():
    raise UserError(f'{run} has softmax scores and a router bias, for which {hf_config.V2} has no place')
  files = plan_files(config, dtype, max_shard_gb, quantize)
  plan = {'checkpoint': str(weights.path), 'written_ns': weights.path.stat().st_mtime_ns, 'config': hf}
  with new_folder(target, plan | {'dtype': dtype, 'max_shard_gb': max_shard_gb}) as folder:
    total_bytes = write_weights(folder, weights, files)
    (folder / 'config.json').write_text(json.dumps(hf, indent=2) + '\n', 'utf-8')
    kind = f'{dtype} and {quantize}' if quantize else dtype
    lines = [f'{target}: step {weights.step} of {run}, {total_bytes:,} bytes of {kind}, files: {len(files)}']
    lines += [*weights.remarks, *_write_tokenizer(folder, run, tokenizer, said)]
    digests.write(folder, {path.name for path in folder.iterdir()} - {PLAN, LOCK, digests.FILE})  # that of a killed one
    return lines


class Entry(NamedTuple):
  """A tensor of the table in a file. dtype: if kind is None. stored: what stands for it, see `formats.described`."""

  tensor: names.Tensor
  dtype: str
  kind: str | None
  stored: dict[str, tuple[str, tuple[int, ...]]]


def plan_files(config: Config, dtype: str, max_shard_gb: float, quantize: str | None) -> list[list[Entry]]:
  """What each file holds. Raises UserError if a tensor cannot be quantised.

  Args:
    config: of the run.
    dtype: of tensors that are not quantised, 'bfloat16' or 'float32'.
    max_shard_gb: the most a file holds, in 1e9 bytes, unless one tensor is larger.
    quantize: what `formats.kind_for` takes.
  """
  shapes, entries = array_shapes(config.model), []
  for tensor in names.table(config.model) + names.copies(config.model):
    kind, plain = formats.kind_for(tensor, quantize), shards.NAMED['float32' if tensor.is_bias else dtype]
    entries.append(Entry(tensor, plain, kind, formats.described(tensor.name, tensor.shape(shapes), plain, kind)))
  grouped = shards.plan([_bytes(entry) for entry in entries], max_shard_gb * 1e9)
  return [[entries[index] for index in indices] for indices in grouped]


def write_weights(folder: Path, weights: RunWeights, files: list[list[Entry]]) -> int:
  """Writes the files that are not there yet, one at a time, and their index. Returns their bytes."""
  file_of: dict[str, str] = {}
  todo = []
  for number, entries in enumerate(files, 1):
    name = f'model-{number:05d}-of-{len(files):05d}.safetensors'
    inside = {part: facts for entry in entries for part, facts in entry.stored.items()}
    file_of |= dict.fromkeys(inside, name)
    if not shards.holds(folder / name, inside):
      todo.append((folder / name, entries))
  _check_space(folder, sum(_bytes(entry) for _, entries in todo for entry in entries))
  for file, entries in tqdm.tqdm(todo, 'writing', unit='file', disable=None):
    tensors: dict[str, np.ndarray] = {}
    for tensor, plain, kind, _ in entries:
      tensors |= formats.encode(tensor.name, tensor.pack(weights.read), plain, kind)
    shards.write_file(file, tensors)
  total_bytes = sum(_bytes(entry) for entries in files for entry in entries)
  shards.write_index(folder, file_of, total_bytes)
  return total_bytes


def _bytes(entry):
  return sum(math.prod(shape) * np.dtype(shards.DTYPES[dtype]).itemsize for dtype, shape in entry.stored.values())


def _check_space(folder, needed):
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise UserError(f'the export needs {needed:,} bytes and the disk of {folder.parent} has {free:,} free')


def _read_tokenizer(run) -> Tokenizer | None:
  return load_saved(run / FILE) if (run / FILE).exists() else None


def _kept_fields(run, config, said) -> dict:
  """What config.json of the folder behind the run says of tokens and, if this is still that model, of its length."""
  from_scratch = (run / 'data.json').exists() and not config.train.init_from
  names = [name for name in folder_tokens.MODEL_FIELDS if name != folder_tokens.LENGTH or not from_scratch]
  fields = said.fields(folder_tokens.CONFIG)
  return {name: fields[name] for name in names if name in fields}


def _write_tokenizer(folder, run, tokenizer, said) -> list[str]:
  for name, text in said.texts.items():
    if name != folder_tokens.CONFIG:
      (folder / name).write_bytes(text)
  if tokenizer is None:
    return [f'no tokenizer.json: {run} has none']
  if isinstance(tokenizer, ByteTokenizer):
    return ['no tokenizer.json: this run reads bytes (ids 0..255, 256 starts a document)']
  served, bos_token = tokenizers.Tokenizer.from_file(str(run / FILE)), tokenizer.token_text(tokenizer.bos_id)
  if said.texts or served.encode('').ids == [tokenizer.bos_id]:
    shutil.copyfile(run / FILE, folder / FILE)
  else:  # who serves the folder encodes a prompt by this file alone, and in training every document began with BOS
    begin = tokenizers.processors.TemplateProcessing(f'{bos_token} $A', special_tokens=[(bos_token, tokenizer.bos_id)])
    before = [served.post_processor] if served.post_processor else []
    served.post_processor = tokenizers.processors.Sequence([*before, begin])
    served.save(str(folder / FILE))
  if folder_tokens.TOKENIZER not in said.texts:
    ends = tokenizer.token_text((*said.eos_ids(tokenizer.token_id), tokenizer.bos_id)[0]) or bos_token
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos_token, 'eos_token': ends}
    (folder / folder_tokens.TOKENIZER).write_text(json.dumps(settings, indent=2) + '\n', 'utf-8')
  return []
