"""A dense product in the precision that the policy says."""

import jax

from moe.config import Config
from moe.ops import fp8


def linear(x: jax.Array, w_DF: jax.Array, module: str, config: Config) -> jax.Array:
  """x [..., D] times w, in FP8 if precision.fp8 names `module`, one of validation.FP8_MODULES.

  Args:
    x: activations.
    w_DF: the matrix, in the same dtype.
    module: whose product it is.
    config: precision.fp8 and grouped_matmul, whose kernels multiply in FP8.
  """
  return fp8.matmul(x, w_DF, config.grouped_matmul) if module in config.precision.fp8_modules else x @ w_DF
