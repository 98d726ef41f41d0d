"""A trained model, ready to generate: from a run directory or a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import Config, DataConfig, MeshConfig, PrecisionConfig
from moe.data import folder_tokens
from moe.data.tokenizer import ByteTokenizer, Tokenizer, load_saved
from moe.errors import UserError
from moe.files.paths import local_path
from moe.interop import hf_config
from moe.interop import load as from_folder
from moe.interop.load import open_checkpoint
from moe.interop.run_sizes import check_layers
from moe.model import transformer
from moe.parallel import sharding
from moe.parallel.mesh import make_mesh, mesh_shape, platform_of, setup_devices
from moe.parallel.resolved import Resolved
from moe.train.checkpoint import restore_weights
from moe.train.run_dir import read_config
from moe.train.state import Weights
from moe.train.step import resolve


class Model(NamedTuple):
  """config: with every 'auto' resolved. params, bias_LE: as in training, on `mesh`. step: of the checkpoint, 0 of a
  Hugging Face one. eos_ids: tokens that end a sequence. remarks: lines for the user."""

  config: Resolved
  mesh: jax.sharding.Mesh
  params: dict
  bias_LE: jax.Array
  tokenizer: Tokenizer
  step: int
  eos_ids: tuple[int, ...]
  remarks: list[str]


def load(path: str | Path, mesh: MeshConfig, compute: str = '', quantized: bool = False, tokenizer: str = '') -> Model:
  """A run's newest checkpoint, or a Hugging Face one, on a mesh.

  Args:
    path: run directory, or folder with a DeepSeek-V3 checkpoint.
    mesh: where to.
    compute: dtype to compute in, 'float32' or 'bfloat16'; '': as in training, or as in the folder.
    quantized: leave experts and feed-forwards as the folder's files hold them, if that is FP8 or MXFP4.
    tokenizer: 'byte' or the path of a tokenizer.json; '': that of the run or folder.

  Raises:
    UserError: neither of the two, no checkpoint, a damaged one, a mesh that does not fit; no tokenizer, or one with
      more ids than the model.
  """
  path = local_path(path, 'path')
  of_hf = not (path / 'checkpoints').is_dir()
  if of_hf and not (path / 'config.json').is_file():
    raise UserError(f'{path} is neither a run directory nor a folder with a Hugging Face checkpoint')
  setup_devices(mesh)
  if of_hf:
    checkpoint = open_checkpoint(path)
    base, remarks = _config_of(checkpoint.model, hf_config.read(path)), checkpoint.remarks
  else:
    base, remarks = read_config(path), []
    check_layers(path, base.model)
  read_by = _tokenizer(path, tokenizer, base.model.vocab_size)
  unresolved = for_inference(base, mesh, compute)
  device_mesh = make_mesh(unresolved)
  config = resolve(unresolved, device_mesh, platform_of(device_mesh))
  if of_hf:
    specs = from_folder.specs(config.model, device_mesh)
    params, bias_LE = from_folder.load(checkpoint, device_mesh, specs, config.precision.compute, quantized)
    step = 0
  else:
    params, bias_LE, step, more = _restore(path, config, device_mesh)
    remarks = [*remarks, *more]
  remarks = [*remarks, *read_by.remarks]
  return Model(config, device_mesh, params, bias_LE, read_by, step, _eos_ids(path, read_by), remarks)


def _config_of(model, fields):
  """The config of a Hugging Face folder: its model, its dtype, and sequences no longer than it was made for."""
  stored, longest = fields.get('torch_dtype', fields.get('dtype')), fields.get('max_position_embeddings')
  compute = 'float32' if stored == 'float32' else 'bfloat16'
  seq_len = min(DataConfig.seq_len, longest) if isinstance(longest, int) else DataConfig.seq_len
  return Config(model=model, data=DataConfig(seq_len=seq_len), precision=PrecisionConfig(compute=compute))


def _tokenizer(path, given, vocab_size):
  """The tokenizer that is given, or that of the run or folder."""
  file = path / 'tokenizer.json'
  if not given and not file.is_file():
    raise UserError(f'{path} has no tokenizer.json; give --tokenizer=FILE, or --tokenizer=byte for a model of bytes')
  tokenizer = ByteTokenizer() if given == 'byte' else load_saved(given or file)
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f'tokenizer {tokenizer.name} of {given or file} has {tokenizer.vocab_size} token ids, and the model in {path} a '
      f'vocabulary of {vocab_size}; give the tokenizer that the model was trained with'
    )
  return tokenizer


def _eos_ids(path, tokenizer):
  """The end tokens that the folder names, or the one that a run was imported from. BOS where none is named, and in
  every run that trained, for there the next document begins with it."""
  named = folder_tokens.read(path).eos_ids(tokenizer.token_id)
  trained = not named or (path / 'data.json').exists()
  return tuple(dict.fromkeys((*named, tokenizer.bos_id) if trained else named))


def _restore(path, config, mesh):
  """Parameters and bias of a run's newest checkpoint, sharded as in training, its step, and lines for the user."""
  abstract = transformer.abstract_params(config)
  like = lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, placed.stored))
  params = jax.tree.map(like, abstract, sharding.place_tree(abstract, mesh))
  bias_shape = config.model.num_routers, config.model.num_experts
  bias = jax.ShapeDtypeStruct(bias_shape, np.float32, sharding=NamedSharding(mesh, P()))
  state, meta, remarks = restore_weights(path, Weights(params, {'bias_LE': bias}))
  return state.params, state.balance['bias_LE'], meta['step'], remarks


def for_inference(config: Config, mesh: MeshConfig, compute: str) -> Config:
  """A run's config on another mesh, with nothing left of how it was trained.

  Args:
    compute: as in `load`.

  Raises:
    UserError: no such dtype or preset, or a pipeline.
  """
  if compute not in ('', 'float32', 'bfloat16'):
    raise UserError(f"dtype {compute!r} must be float32, bfloat16, or '' for that of the training")
  precision = dataclasses.replace(config.precision, fp8='', compute=compute or config.precision.compute)
  pipe, data, expert, _ = mesh_shape(mesh)
  if pipe > 1:
    raise UserError(
      f'config mesh.pipe = {pipe} is for training: a trained model goes through no pipeline; set mesh.pipe=1, and '
      'mesh.expert or mesh.tensor to divide it'
    )
  train = dataclasses.replace(config.train, batch_size=data * expert, microbatches=1, remat='none')
  return dataclasses.replace(
    config, precision=precision, mesh=mesh, train=train, dispatch='auto', grouped_matmul='auto'
  )
