"""SwiGLU's gate (arXiv 2002.05202), for code that multiplies and for kernels."""

import jax


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up."""
  return jax.nn.silu(gate) * up
