"""Grouped matmul: consecutive rows belong to consecutive experts, and each expert has its own matrix.

`grouped_matmul(x_MD, w_eDF, size_e)` is one interface over backends, one per file:

    blocked     loops over blocks of each expert's rows; FLOPs follow the real sizes. For CPU.
    mosaic_gpu  Pallas kernels for Hopper GPUs (compute capability 9.0), bfloat16.
    ragged_dot  `jax.lax.ragged_dot`: native on TPU; dense over all experts (e times the FLOPs) on CPU and CUDA.

Each has a function `matmul(x_MD, w_eDF, size_e) -> y_MF`, differentiable in x and w.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.errors import UserError
from moe.ops.grouped_matmul import blocked, mosaic_gpu, ragged_dot
from moe.ops.permute import key_of, lay_out, permute
from moe.ops.varying import align

BACKENDS = {'blocked': blocked.matmul, 'mosaic_gpu': mosaic_gpu.matmul, 'ragged_dot': ragged_dot.matmul}
SAVED = 'grouped_matmul'  # name of results, for policies of jax.checkpoint, which do not see products inside kernels
ROW_MULTIPLES = {'blocked': 1, 'mosaic_gpu': mosaic_gpu.ROW_MULTIPLE, 'ragged_dot': 1}  # of every expert's rows


def resolve_backend(name: str, platform: str, compute: str) -> str:
  """The backend that 'auto' means on a platform for a compute dtype; any other name is kept.

  Args:
    name: a key of BACKENDS, or 'auto'.
    platform: 'cpu', 'tpu', 'hopper' for GPUs of compute capability 9.0, 'gpu' for others.
    compute: 'float32' or 'bfloat16'.

  Raises:
    UserError: the backend does not run there.
  """
  if name == 'auto':
    on_gpu = 'mosaic_gpu' if compute == 'bfloat16' else 'ragged_dot'
    return {'cpu': 'blocked', 'hopper': on_gpu}.get(platform, 'ragged_dot')
  if name == 'mosaic_gpu' and (platform, compute) != ('hopper', 'bfloat16'):
    raise UserError(
      f'config grouped_matmul = {name!r} needs a Hopper GPU and precision.compute = bfloat16, '
      f'not {platform} and {compute}'
    )
  return name


def grouped_matmul(
  x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array, backend: str, row_multiple: int = 1
) -> jax.Array:
  """Multiplies each expert's rows with that expert's matrix.

  Args:
    x_MD: rows sorted by expert; the first size_e[0] belong to expert 0, and so on.
    w_eDF: a matrix per expert.
    size_e: int32 rows per expert, any of them 0; their sum is at most M.
    backend: a key of BACKENDS.
    row_multiple: what the caller promises every size_e to be a multiple of. If that is less than the backend needs
      (ROW_MULTIPLES), rows are moved apart before and together after, at the cost of two copies.

  Returns:
    y_MF in x's dtype. Rows past sum(size_e) are unspecified, and contribute no gradient to w.
  """
  # Aligned out here, so that the transpose of the cast puts the reductions of the gradients where jnp code would.
  x_MD, w_eDF, size_e = align(x_MD, w_eDF, size_e)
  needed = ROW_MULTIPLES[backend]
  if row_multiple % needed == 0:
    return checkpoint_name(BACKENDS[backend](x_MD, w_eDF, size_e), SAVED)
  expert_M1 = key_of(jnp.arange(len(x_MD)), jnp.cumsum(size_e))[:, None]  # len(size_e) past the sum
  layout = lay_out(expert_M1[:, 0], len(size_e), len(x_MD), needed)
  out, back = layout.permutations(expert_M1 < len(size_e))
  return checkpoint_name(permute(BACKENDS[backend](permute(x_MD, out), w_eDF, layout.size), back), SAVED)
