"""A DeepSeek-V3 checkpoint in Hugging Face's format as a run directory, or as parameters in memory."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe import mesh, run_dir
from moe.checkpoint import Checkpoints, flatten
from moe.config import Config, ModelConfig
from moe.errors import UserError
from moe.files import write_atomically
from moe.interop import hf_config, names, shards
from moe.interop.folder import new_folder
from moe.model import transformer
from moe.state import TrainState

SCALE = '_scale_inv'  # a weight in FP8 has a second tensor, its name with this behind


def import_run(source: Path, run: Path) -> list[str]:
  """Makes the run directory `run` from the checkpoint in `source`. Returns lines for the user.

  The run has weights and router bias at step 0 and no moments: `train.init_from` starts from it, `config.py` in it
  holds the model's settings.

  Raises:
    UserError: `run` exists, disk full, or anything that `read_checkpoint` refuses.
  """
  with new_folder(run) as folder:
    model, params, bias_LE, lines = read_checkpoint(source)
    config = Config(model=model)
    if (source / 'tokenizer.json').is_file():
      shutil.copyfile(source / 'tokenizer.json', folder / 'tokenizer.json')
      path = str((run / 'tokenizer.json').absolute())
      config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))
    else:
      lines.append(f'no tokenizer.json in {source}; set data.tokenizer')
    _save(folder, params, bias_LE)
    run_dir.describe_run(folder, config, mesh.make_mesh(Config()), run_dir.command_line())
    write_atomically(folder / 'config.py', _config_file(config))
  arguments = f'--config={run}/config.py --config.train.init_from={run}'
  return [*lines, f'{run}: weights of {source}; train on with {arguments}']


def read_checkpoint(source: Path) -> tuple[ModelConfig, dict, np.ndarray, list[str]]:
  """The checkpoint in the folder `source`, in host memory.

  Returns:
    The model's settings; float32 parameters as the nested dict of `transformer.init_params`; bias_LE; remarks.

  Raises:
    UserError: not a DeepSeek-V3 checkpoint, or one of its tensors is unknown, missing, misshapen or damaged.
  """
  file = source / 'config.json'
  model, stored = hf_config.from_hf(hf_config.read(source), file), shards.open_folder(source)
  lines = []
  if model.mtp_depth and not any(name.startswith(f'model.layers.{model.num_layers}.') for name in stored):
    lines.append(f'{file} names {model.mtp_depth} MTP module(s) and the files hold none: imported without')
    model = dataclasses.replace(model, mtp_depth=0)
  params = transformer.abstract_params(Config(model=model))
  shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
  shapes['bias_LE'] = (model.num_routers, model.num_experts)
  tensors, copies = names.table(model), names.copies(model)
  if model.tie_embeddings:
    copies.append(names.head(model))
  _check(source, stored, tensors, copies, shapes)
  arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}  # zeros: the vocabulary's padding
  for tensor in tqdm.tqdm(tensors, 'reading', unit='tensor', disable=None):
    tensor.unpack(_values(stored, tensor.name), arrays)
  for tensor in copies:
    if tensor.name in stored and not np.array_equal(_values(stored, tensor.name), tensor.pack(arrays)):
      of = 'embedding' if tensor.views[0].name == 'w_embedding_VD' else 'head'
      raise UserError(f'{stored[tensor.name].file}: {tensor.name} differs from the {of} that the model shares')
  leaves = [arrays[name] for name in flatten(params)]
  return model, jax.tree.unflatten(jax.tree.structure(params), leaves), arrays['bias_LE'], lines


def _check(source, stored, tensors, copies, shapes):
  """Accounts for every tensor before any is read."""
  expected = {tensor.name: tensor.shape(shapes) for tensor in tensors + copies}
  for name, found in stored.items():
    base = name.removesuffix(SCALE)
    if name not in expected and (base == name or base not in expected):
      raise UserError(f'{found.file}: unknown tensor {name}')
  for tensor in tensors:
    if tensor.name not in stored:
      raise UserError(f'{source}: tensor {tensor.name} is missing')
  for name, shape in expected.items():
    if name in stored:
      _check_tensor(name, stored, shape)


def _check_tensor(name, stored, shape):
  found, scale = stored[name], stored.get(name + SCALE)
  if found.shape != shape:
    raise UserError(f'{found.file}: {name} has shape {list(found.shape)} and must have {list(shape)}')
  if found.dtype in shards.FP8 and len(shape) == 2:
    if scale is None:
      raise UserError(f'{found.file}: {name} is {found.dtype} and {name + SCALE} is missing')
    blocks = shards.blocks(shape)
    if scale.shape != blocks or scale.dtype not in shards.FLOATS:
      raise UserError(
        f'{scale.file}: {name + SCALE} is {scale.dtype} {list(scale.shape)} and must be F32 {list(blocks)}'
      )
  elif found.dtype not in shards.FLOATS:
    raise UserError(f'{found.file}: {name} is {found.dtype} and must be one of {", ".join(shards.DTYPES)}')
  elif scale is not None:
    raise UserError(f'{scale.file}: {name + SCALE} belongs to a weight of {found.dtype}, which has no scales')


def _values(stored, name) -> np.ndarray:
  """float32 values of a tensor that `_check_tensor` passed."""
  value = stored[name].read()
  if stored[name].dtype in shards.FP8:
    return shards.dequantise(value, stored[name + SCALE].read())
  return value.astype(np.float32, copy=False)


def _save(folder, params, bias_LE):
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    weights, bias_LE = jax.tree.map(jnp.asarray, (params, bias_LE))
    imported = TrainState(jnp.zeros((), jnp.int32), weights, {'bias_LE': bias_LE}, ())
  checkpoints = Checkpoints(folder)
  try:
    checkpoints.save(imported, {'step': 0, 'tokens': 0})
    checkpoints.wait()
  finally:
    checkpoints.close()


def _config_file(config) -> str:
  """A file for --config with the imported model's settings."""
  model = ''.join(f'        {name}={value!r},\n' for name, value in dataclasses.asdict(config.model).items())
  return (
    '"""The model of an imported checkpoint; override what else a run needs."""\n\n'
    'from moe.config import Config, DataConfig, ModelConfig, to_config_dict\n\n\n'
    "def get_config(arg: str = ''):\n"
    '  return to_config_dict(\n'
    '    Config(\n'
    f'      model=ModelConfig(\n{model}      ),\n'
    f'      data=DataConfig(tokenizer={config.data.tokenizer!r}),\n'
    '    ),\n'
    '    arg,\n'
    '  )\n'
  )
