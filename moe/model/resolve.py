"""What 'auto' means: which dispatcher and which grouped matmul run on a platform, for so many expert shards."""

from moe.config import Config
from moe.errors import UserError
from moe.parallel.resolved import AXES, Axes, Resolved
from moe.registry import GROUPED_MATMULS


def resolve(config: Config, expert_shards: int, platform: str, axes: Axes = AXES) -> Resolved:
  """The config with every 'auto' replaced.

  Args:
    config: as the user gave it.
    expert_shards: that the experts are divided over.
    platform: as from `mesh.platform_of`.
    axes: names of the mesh's axes.

  Raises:
    UserError: a backend or the FP8 policy does not run there.
  """
  fp8, compute = config.precision.fp8, config.precision.compute
  if fp8 and (platform, compute) == ('hopper', 'float32'):
    raise UserError(f'config precision.fp8 = {fp8!r} needs precision.compute = bfloat16 on a Hopper GPU, not {compute}')
  backend = grouped_matmul(config.grouped_matmul, platform, compute)
  return Resolved.of(
    config,
    axes=axes,
    dispatch=dispatcher(config.dispatch, expert_shards),
    grouped_matmul=backend,
    row_multiple=GROUPED_MATMULS[backend].row_multiple,
  )


def dispatcher(name: str, expert_shards: int) -> str:
  """The dispatcher that 'auto' means on so many expert shards; any other name is kept."""
  return name if name != 'auto' else ('local' if expert_shards == 1 else 'all_gather')


def grouped_matmul(name: str, platform: str, compute: str) -> str:
  """The backend that 'auto' means on a platform for a compute dtype; any other name is kept.

  Args:
    name: of `moe.ops.grouped_matmul`, or 'auto'.
    platform: 'cpu', 'tpu', 'hopper' for GPUs of compute capability 9.0, 'gpu' for others.
    compute: 'float32' or 'bfloat16'.

  Raises:
    UserError: the backend does not run there.
  """
  if name == 'auto':
    return {('hopper', 'bfloat16'): 'mosaic_gpu', ('cpu', compute): 'blocked'}.get((platform, compute), 'ragged_dot')
  only_on = GROUPED_MATMULS[name].only_on
  if only_on not in (None, (platform, compute)):
    raise UserError(
      f'config grouped_matmul = {name!r} needs a platform of kind {only_on[0]} and precision.compute = {only_on[1]}, '
      f'not {platform} and {compute}'
    )
  return name
