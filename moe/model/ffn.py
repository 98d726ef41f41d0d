"""SwiGLU feed-forwards (arXiv 2002.05202): dense, and one per expert.

The hidden width F is sharded over `tensor`; both return this shard's part of the output, for the caller to sum.
"""

import functools

import jax
from flax import nnx

from moe.config import ModelConfig
from moe.model.parameters import Init
from moe.ops.grouped_matmul import ROW_MULTIPLES, grouped_matmul


class FeedForward(nnx.Module):
  """Dense SwiGLU: the leading layers, and the shared experts as one."""

  def __init__(self, d_model: int, hidden: int, init: Init):
    self.w_gate_DF = init.normal(d_model, hidden)
    self.w_up_DF = init.normal(d_model, hidden)
    self.w_down_FD = init.normal(hidden, d_model)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> this tensor shard's part of [..., D]."""
    return (jax.nn.silu(x @ self.w_gate_DF[...]) * (x @ self.w_up_DF[...])) @ self.w_down_FD[...]


class Experts(nnx.Module):
  """The routed experts held by this shard."""

  def __init__(self, config: ModelConfig, init: Init):
    E, D, F = config.num_experts, config.d_model, config.d_expert
    self.w_gate_eDF = init.normal(E, D, F)
    self.w_up_eDF = init.normal(E, D, F)
    self.w_down_eFD = init.normal(E, F, D)

  def __call__(self, x_MD: jax.Array, size_e: jax.Array, backend: str) -> jax.Array:
    """Rows sorted by expert -> this tensor shard's part of [M, D].

    Args:
      x_MD: rows.
      size_e: rows per expert, multiples of the backend's ROW_MULTIPLES.
      backend: as in `grouped_matmul`.
    """
    product = functools.partial(grouped_matmul, size_e=size_e, backend=backend, row_multiple=ROW_MULTIPLES[backend])
    gate_MF = product(x_MD, self.w_gate_eDF[...])
    up_MF = product(x_MD, self.w_up_eDF[...])
    return product(jax.nn.silu(gate_MF) * up_MF, self.w_down_eFD[...])
