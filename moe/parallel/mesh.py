"""The device mesh: always the four axes (pipe, data, expert, tensor), each of size 1 when unused.

The batch is sharded over `data` and `expert` together (`BATCH_AXES`): an expert shard is also a data shard, as in
DeepSeek-V3 (arXiv 2412.19437, section 3.2).
"""

import math
import os

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from moe.config import Config, MeshConfig
from moe.errors import UserError
from moe.parallel.schedule import make
from moe.parallel.stages import divide, together
from moe.validation import parameters

AXES = ('pipe', 'data', 'expert', 'tensor')
BATCH_AXES = ('data', 'expert')

MOST_PER_RANK = 4  # microbatches, where their number is left to the mesh: the bubble is then a fifth or less of a step

HOPPER = AbstractDevice('NVIDIA H100', num_cores=132, platform='gpu')  # what kernels are lowered for without a device

# (pipe, data, expert, tensor). The H20 cluster has 2 nodes of 8 GPUs.
PRESETS = {
  'local': (1, 1, 1, 1),
  'h20x16': (2, 1, 8, 1),  # train: a pipeline stage per node, experts inside a node
  'h20x16_ep': (1, 1, 16, 1),  # train: experts over both nodes
  'h20x16_serve': (2, 1, 1, 8),  # serve: tensor parallel inside a node, two stages
}


def mesh_shape(mesh: MeshConfig) -> tuple[int, int, int, int]:
  """Sizes of the four axes: the preset's, each replaced by the config's own where that is not 0."""
  if mesh.preset not in PRESETS:
    raise UserError(f'config mesh.preset = {mesh.preset!r} must be one of {", ".join(PRESETS)}')
  own = (mesh.pipe, mesh.data, mesh.expert, mesh.tensor)
  pipe, data, expert, tensor = (size or default for size, default in zip(own, PRESETS[mesh.preset], strict=True))
  return pipe, data, expert, tensor


def setup_devices(mesh: MeshConfig) -> None:
  """Splits the CPU and lets JAX join the other processes, as configured. Call before the first use of any device.

  The processes should have met before (`processes.joined`): what goes wrong here, JAX does not say in a line.
  """
  if mesh.cpu_devices:
    try:
      jax.config.update('jax_platforms', 'cpu')
      jax.config.update('jax_num_cpu_devices', mesh.cpu_devices)
    except RuntimeError:
      raise UserError(
        f'config mesh.cpu_devices = {mesh.cpu_devices} must be set before JAX is first used in a process; restart it'
      ) from None
  if mesh.num_processes > 1:
    processes = mesh.coordinator, mesh.num_processes, mesh.process_id
    jax.distributed.initialize(*processes, initialization_timeout=mesh.start_timeout_s)


def make_mesh(config: Config) -> Mesh:
  """The mesh of a config over the first devices of the run.

  Raises:
    UserError: the mesh does not fit the devices, or the model or batch does not fit the mesh.
  """
  shape = mesh_shape(config.mesh)
  validate_mesh(config, shape)
  size, devices = math.prod(shape), jax.devices()
  if size > len(devices):
    raise UserError(
      f'the mesh {describe(shape)} needs {size} devices and there are {len(devices)}; on a CPU set '
      f'mesh.cpu_devices={size}'
    )
  if jax.process_count() > 1 and size != len(devices):
    raise UserError(
      f'the mesh {describe(shape)} needs {size} devices, and {jax.process_count()} processes have {len(devices)}: '
      'a run of several processes uses all of them'
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:size])


def without_pipe(mesh: Mesh) -> Mesh:
  """The same devices in the same order, those along `pipe` along `data`: for what goes through no pipeline.

  So evaluation and generation do: each device has its share of all layers, and all of them work all the time.
  """
  pipe, data, expert, tensor = mesh.devices.shape
  devices = mesh.devices.reshape(1, pipe * data, expert, tensor)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4) if pipe > 1 else mesh


def check_memory(config: Config, mesh: Mesh) -> None:
  """Refuses a model that cannot be trained on the mesh, before minutes go into tracing it.

  Raises:
    UserError: the fp32 masters and both moments alone are more than all devices hold; those of a CPU share its memory.
  """
  device = jax.local_devices()[0]
  if stats := device.memory_stats():
    held_bytes = stats.get('bytes_limit', math.inf) * mesh.size
  else:
    held_bytes = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') * jax.process_count()
  size, moment_bytes = parameters(config.model), 2 if config.optimizer.moments == 'bfloat16' else 4
  needed_bytes = size * (4 + 2 * moment_bytes)
  if needed_bytes > held_bytes:
    raise UserError(
      f'a model of {size:.3g} parameters needs {needed_bytes / 1e9:,.0f} GB for masters and moments, and the '
      f'{mesh.size} device(s) of the mesh hold {held_bytes / 1e9:,.0f} GB; use a smaller model or more devices'
    )


def peak_memory(mesh: Mesh) -> dict[int, int]:
  """Rank of the pipeline -> most bytes that a device of it has held so far, of this process's devices; {} on CPUs."""
  found: dict[int, int] = {}
  for (rank, *_), device in np.ndenumerate(mesh.devices):
    if device.process_index == jax.process_index() and (stats := device.memory_stats()):
      found[rank] = max(found.get(rank, 0), stats['peak_bytes_in_use'])
  return found


def platform_of(mesh: Mesh) -> str:
  """What kernels are chosen by: 'cpu', 'tpu', 'hopper' (GPUs of compute capability 9.0) or 'gpu' (all others)."""
  return platform_of_device(mesh.devices.flat[0])


def platform_of_device(device: jax.Device) -> str:
  """See `platform_of`."""
  return 'hopper' if device.platform == 'gpu' and device.compute_capability == '9.0' else device.platform


def abstract_mesh(shape: tuple[int, int, int, int]) -> AbstractMesh:
  """A mesh without devices, to trace and lower programs for clusters of Hopper GPUs that are not at hand."""
  return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=HOPPER)


def describe(shape) -> str:
  return '(' + ', '.join(f'{axis} {size}' for axis, size in zip(AXES, shape, strict=True)) + ')'


def validate_mesh(config: Config, shape: tuple[int, int, int, int]) -> None:
  """Checks that model, batch and dispatch fit a mesh of this shape. Raises UserError."""
  pipe, data, expert, tensor = shape
  model, train = config.model, config.train
  if pipe > 1:
    _validate_pipeline(config, shape)
  for name, value, axis, size in (
    ('model.num_experts', model.num_experts, 'expert', expert),
    ('model.num_heads', model.num_heads, 'tensor', tensor),
    ('model.d_ff', model.d_ff, 'tensor', tensor),
    ('model.d_expert', model.d_expert, 'tensor', tensor),
    ('the padded vocabulary', model.padded_vocab, 'tensor', tensor),
  ):
    if value % size:
      raise UserError(f'{name} = {value} must be divisible by the {axis} axis of the mesh, {size}')
  number = microbatches(config, shape)
  parts = data * expert * number
  if train.batch_size % parts:
    raise UserError(
      f'config train.batch_size = {train.batch_size} must be divisible by data x expert x train.microbatches = '
      f'{data} x {expert} x {number} = {parts}'
    )
  if config.dispatch == 'local' and expert > 1:
    raise UserError(
      f"config dispatch = 'local' works on one expert shard, and the mesh has {expert}; use auto, all_gather, "
      'all_to_all or ragged'
    )


def microbatches(config: Config, shape: tuple[int, int, int, int]) -> int:
  """train.microbatches, or where that is 0: 1, and in a pipeline as many as divide the batch, up to 4 per rank."""
  pipe, data, expert, _ = shape
  if config.train.microbatches or pipe == 1:
    return config.train.microbatches or 1
  each = config.train.batch_size // (data * expert)  # sequences of a shard
  step = 2 if config.train.schedule == 'dualpipe' else 1  # it needs an even number
  fit = [number for number in range(step, MOST_PER_RANK * pipe + 1, step) if each and each % number == 0]
  return max(fit, default=1)


def _validate_pipeline(config: Config, shape: tuple[int, int, int, int]) -> None:
  pipe, data, expert, _ = shape
  layers, number = config.model.num_moe_layers, microbatches(config, shape)
  if pipe > layers:
    raise UserError(f'config mesh.pipe = {pipe} must be at most the MoE layers of the model, {layers}')
  if config.balance.aux_loss == 'switch' and config.balance.aux_scope == 'global_batch':
    raise UserError(
      "config balance.aux_scope = 'global_batch' asks for the loads of earlier microbatches, which a pipeline has not "
      "counted yet; use 'microbatch'"
    )
  if number < pipe:
    raise UserError(
      f'config train.microbatches = {number} is too few for a pipeline of {pipe} ranks: at least {pipe}, and '
      f'train.batch_size = {config.train.batch_size} a multiple of data x expert x microbatches, such as '
      f'{data} x {expert} x {pipe} = {data * expert * pipe}'
    )
  schedule = make(config.train.schedule, pipe, number)
  divide(layers, together(schedule))
