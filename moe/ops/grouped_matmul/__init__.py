"""Grouped matmul: consecutive rows belong to consecutive experts, and each expert has its own matrix.

`grouped_matmul(x_MD, w_eDF, size_e)` is one interface over backends, one per file:

    blocked     loops over blocks of each expert's rows; FLOPs follow the real sizes. For CPU.
    ragged_dot  `jax.lax.ragged_dot`: native on TPU; dense over all experts (e times the FLOPs) on CPU and CUDA.

A backend is a function `matmul(x_MD, w_eDF, size_e) -> y_MF`, differentiable in x and w.
"""

import jax

from moe.ops.grouped_matmul.blocked import blocked
from moe.ops.grouped_matmul.ragged_dot import ragged_dot
from moe.ops.varying import align

BACKENDS = {'blocked': blocked, 'ragged_dot': ragged_dot}


def resolve_backend(name: str, platform: str) -> str:
  """The backend that 'auto' means on a platform ('cpu', 'gpu', 'tpu'); any other name is kept."""
  return name if name != 'auto' else {'cpu': 'blocked'}.get(platform, 'ragged_dot')


def grouped_matmul(x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array, backend: str) -> jax.Array:
  """Multiplies each expert's rows with that expert's matrix.

  Args:
    x_MD: rows sorted by expert; the first size_e[0] belong to expert 0, and so on.
    w_eDF: a matrix per expert.
    size_e: int32 rows per expert, any of them 0; their sum is at most M.
    backend: a key of BACKENDS.

  Returns:
    y_MF in x's dtype. Rows past sum(size_e) are unspecified, but finite if x is, and contribute no gradient to w.
  """
  # Aligned out here, so that the transpose of the cast puts the reductions of the gradients where jnp code would.
  return BACKENDS[backend](*align(x_MD, w_eDF, size_e))
