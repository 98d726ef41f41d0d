"""A trained model, ready to generate: from a run directory or a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe import sharding
from moe.checkpoint import Checkpoints
from moe.config import Config, MeshConfig, PrecisionConfig
from moe.data.tokenizer import Tokenizer, load_saved
from moe.errors import UserError
from moe.interop import load as from_folder
from moe.interop.load import open_checkpoint
from moe.mesh import make_mesh, platform_of, setup_devices
from moe.model import transformer
from moe.run_dir import read_config
from moe.state import TrainState
from moe.step import resolve


class Model(NamedTuple):
  """config: with every 'auto' resolved. params, bias_LE: as in training, on `mesh`. step: of the checkpoint."""

  config: Config
  mesh: jax.sharding.Mesh
  params: dict
  bias_LE: jax.Array
  tokenizer: Tokenizer
  step: int


def load(path: str | Path, mesh: MeshConfig, compute: str = '', quantized: bool = False) -> Model:
  """A run's newest checkpoint, or a Hugging Face one, on a mesh.

  Args:
    path: run directory, or folder with a DeepSeek-V3 checkpoint.
    mesh: where to.
    compute: dtype to compute in, 'float32' or 'bfloat16'; '': as in training, or as in the folder.
    quantized: leave experts and feed-forwards as the folder's files hold them, if that is FP8 or MXFP4.

  Raises:
    UserError: neither of the two, no checkpoint, a damaged one, a mesh that does not fit, no tokenizer.
  """
  path = Path(path).expanduser()
  of_hf = not (path / 'checkpoints').is_dir()
  if of_hf and not (path / 'config.json').is_file():
    raise UserError(f'{path} is neither a run directory nor a folder with a Hugging Face checkpoint')
  setup_devices(mesh)
  if of_hf:
    checkpoint = open_checkpoint(path)
    base = Config(model=checkpoint.model, precision=PrecisionConfig(compute='bfloat16'))
  else:
    base = read_config(path)
  config = for_inference(base, mesh, compute)
  device_mesh = make_mesh(config)
  config = resolve(config, device_mesh, platform_of(device_mesh))
  if of_hf:
    specs = from_folder.specs(config.model, device_mesh)
    params, bias_LE = from_folder.load(checkpoint, device_mesh, specs, config.precision.compute, quantized)
    step = 0
  else:
    params, bias_LE, step = _restore(path, config, device_mesh)
  return Model(config, device_mesh, params, bias_LE, load_saved(path / 'tokenizer.json'), step)


def _restore(path, config, mesh):
  """Parameters and bias of a run's newest checkpoint, sharded as in training, and its step."""
  abstract = transformer.abstract_params(config)
  like = lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, placed.stored))
  params = jax.tree.map(like, abstract, sharding.place_tree(abstract, mesh))
  bias_shape = config.model.num_routers, config.model.num_experts
  bias = jax.ShapeDtypeStruct(bias_shape, np.float32, sharding=NamedSharding(mesh, P()))
  checkpoints = Checkpoints(path)
  try:
    state = checkpoints.restore_weights(TrainState((), params, {'bias_LE': bias}, ()))
    return state.params, state.balance['bias_LE'], checkpoints.latest()
  finally:
    checkpoints.close()


def for_inference(config: Config, mesh: MeshConfig, compute: str) -> Config:
  """A run's config on another mesh, with nothing left of how it was trained."""
  if compute not in ('', 'float32', 'bfloat16'):
    raise UserError(f"dtype {compute!r} must be float32, bfloat16, or '' for that of the training")
  precision = dataclasses.replace(config.precision, fp8='', compute=compute or config.precision.compute)
  shards = max(mesh.data, 1) * max(mesh.expert, 1)
  train = dataclasses.replace(config.train, batch_size=shards, microbatches=1, remat='none')
  return dataclasses.replace(
    config, precision=precision, mesh=mesh, train=train, dispatch='auto', grouped_matmul='auto'
  )
