"""SwiGLU feed-forwards (arXiv 2002.05202): dense, and one per expert.

The hidden width F is sharded over `tensor`; both return this shard's part of the output, for the caller to sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe.config import Config, ModelConfig
from moe.model.linear import linear
from moe.model.parameters import Init
from moe.ops import fp8
from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.swiglu import gated
from moe.parallel.resolved import Resolved


class FeedForward(nnx.Module):
  """Dense SwiGLU: the leading layers, and the shared experts as one."""

  def __init__(self, d_model: int, hidden: int, init: Init):
    self.w_gate_DF = init.normal(d_model, hidden)
    self.w_up_DF = init.normal(d_model, hidden)
    self.w_down_FD = init.normal(hidden, d_model)

  def __call__(self, x: jax.Array, config: Config) -> jax.Array:
    """[..., D] -> this tensor shard's part of [..., D]."""
    product = lambda x, w: linear(x, w, 'ffn', config)
    return swiglu(x, self.w_gate_DF[...], self.w_up_DF[...], self.w_down_FD[...], product)


class Experts(nnx.Module):
  """The routed experts held by this shard."""

  def __init__(self, config: ModelConfig, init: Init):
    E, D, F = config.num_experts, config.d_model, config.d_expert
    self.w_gate_eDF = init.normal(E, D, F)
    self.w_up_eDF = init.normal(E, D, F)
    self.w_down_eFD = init.normal(E, F, D)

  def __call__(self, x_MD: jax.Array, size_e: jax.Array, config: Resolved) -> jax.Array:
    """Rows sorted by expert -> this tensor shard's part of [M, D].

    Args:
      x_MD: rows.
      size_e: rows per expert, multiples of row_multiple.
      config: grouped_matmul, row_multiple, precision.fp8.
    """
    backend, in_fp8 = config.grouped_matmul, config.precision.fp8_modules

    def product(x, w):
      if 'experts' in in_fp8:
        return fp8.grouped_matmul(x, w, size_e, backend, power_of_two='dispatch' in in_fp8)
      return grouped_matmul(x, w, size_e, backend, config.row_multiple)

    return swiglu(x_MD, self.w_gate_eDF[...], self.w_up_eDF[...], self.w_down_eFD[...], product)


def swiglu(x, w_gate, w_up, w_down, product: Callable) -> jax.Array:
  """(silu(x w_gate) * x w_up) w_down, in two calls of `product`.

  The two matrices that take x go side by side as one: x is read, and its gradient summed, once.

  Args:
    x: rows [..., D].
    w_gate, w_up: [..., D, F] each.
    w_down: [..., F, D].
    product: (rows, weights) -> rows, such as a grouped matmul.
  """
  gate, up = jnp.split(product(x, jnp.concatenate([w_gate, w_up], axis=-1)), 2, axis=-1)
  return product(gated(gate, up), w_down)
