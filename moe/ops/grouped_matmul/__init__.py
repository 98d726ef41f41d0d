"""Grouped matmul: consecutive rows belong to consecutive experts, and each expert has its own matrix.

`grouped_matmul(x_MD, w_eDF, size_e)` is one interface over backends, one per file:

    blocked     loops over blocks of each expert's rows; FLOPs follow the real sizes. For CPU.
    mosaic_gpu  Pallas kernels for Hopper GPUs (compute capability 9.0), bfloat16.
    ragged_dot  `jax.lax.ragged_dot`: native on TPU; dense over all experts (e times the FLOPs) on CPU and CUDA.

Each file makes a `Backend`, as `BACKEND`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.ops.permute import key_of, lay_out, permute
from moe.ops.varying import align
from moe.registry import GROUPED_MATMULS

SAVED = 'grouped_matmul'  # name of results, for policies of jax.checkpoint, which do not see products inside kernels


@dataclasses.dataclass(frozen=True)
class Backend:
  """One way to multiply.

  matmul: (x_MD, w_eDF, size_e) -> y_MF, differentiable in x and w; all operands vary over the same mesh axes.
  row_multiple: what it needs every size_e to be a multiple of.
  only_on: the one platform and compute dtype it runs on, such as ('hopper', 'bfloat16'); None for all.
  """

  matmul: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  row_multiple: int = 1
  only_on: tuple[str, str] | None = None

  def __post_init__(self):
    if not callable(self.matmul) or type(self.row_multiple) is not int or self.row_multiple < 1:
      raise ValueError(f'a Backend has a function and a row_multiple of 1 or more, not {self}')


def grouped_matmul(
  x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array, backend: str, row_multiple: int = 1
) -> jax.Array:
  """Multiplies each expert's rows with that expert's matrix.

  Args:
    x_MD: rows sorted by expert; the first size_e[0] belong to expert 0, and so on.
    w_eDF: a matrix per expert.
    size_e: int32 rows per expert, any of them 0; their sum is at most M.
    backend: a file of this folder.
    row_multiple: what the caller promises every size_e to be a multiple of. If that is less than the backend needs
      (row_multiple), rows are moved apart before and together after, at the cost of two copies.

  Returns:
    y_MF in x's dtype. Rows past sum(size_e) are unspecified, and contribute no gradient to w.
  """
  # Aligned out here, so that the transpose of the cast puts the reductions of the gradients where jnp code would.
  x_MD, w_eDF, size_e = align(x_MD, w_eDF, size_e)
  chosen = GROUPED_MATMULS[backend]
  if row_multiple % chosen.row_multiple == 0:
    return checkpoint_name(multiply(x_MD, w_eDF, size_e, backend), SAVED)
  expert_M1 = key_of(jnp.arange(len(x_MD)), jnp.cumsum(size_e))[:, None]  # len(size_e) past the sum
  layout = lay_out(expert_M1[:, 0], len(size_e), len(x_MD), chosen.row_multiple)
  out, back = layout.permutations(expert_M1 < len(size_e))
  return checkpoint_name(permute(multiply(permute(x_MD, out), w_eDF, layout.size, backend), back), SAVED)


def multiply(x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array, backend: str) -> jax.Array:
  """y_MF as the backend gives it, of operands as it wants them.

  Args:
    x_MD, w_eDF, size_e: of `Backend.matmul`.
    backend: a file of this folder.

  Raises:
    UserError: the backend gives an array of another shape.
  """
  y_MF = GROUPED_MATMULS[backend].matmul(x_MD, w_eDF, size_e)
  GROUPED_MATMULS.expect(backend, 'y_MF', y_MF, (x_MD.shape[0], w_eDF.shape[2]), x_MD.dtype)
  return y_MF
