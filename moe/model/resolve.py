"""What 'auto' means: which dispatcher and which grouped matmul run on a platform, for so many expert shards."""

from moe.config import Config
from moe.errors import UserError
from moe.model import dispatch
from moe.ops import grouped_matmul
from moe.parallel.resolved import AXES, Axes, Resolved


def resolve(config: Config, expert_shards: int, platform: str, axes: Axes = AXES) -> Resolved:
  """The config with every 'auto' replaced.

  Args:
    expert_shards: that the experts are divided over.
    platform: as from `mesh.platform_of`.
    axes: names of the mesh's axes.

  Raises:
    UserError: a backend or the FP8 policy does not run there.
  """
  fp8, compute = config.precision.fp8, config.precision.compute
  if fp8 and (platform, compute) == ('hopper', 'float32'):
    raise UserError(f'config precision.fp8 = {fp8!r} needs precision.compute = bfloat16 on a Hopper GPU, not {compute}')
  backend = grouped_matmul.resolve_backend(config.grouped_matmul, platform, compute)
  return Resolved.of(
    config,
    axes=axes,
    dispatch=dispatch.resolve_backend(config.dispatch, expert_shards),
    grouped_matmul=backend,
    row_multiple=grouped_matmul.ROW_MULTIPLES[backend],
  )
