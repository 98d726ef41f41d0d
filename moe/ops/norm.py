"""RMSNorm (arXiv 1910.07467) with float32 statistics."""

import jax
import jax.numpy as jnp

LATENT_EPS = 1e-6  # of the norms of MLA's latents, in every DeepSeek-V3 model, whatever its other norms have


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, in x's dtype."""
  x32 = x.astype(jnp.float32)
  normed = x32 * inverse_rms((x32 * x32).sum(-1, keepdims=True), x.shape[-1], eps)
  return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def inverse_rms(squares: jax.Array, width: int, eps: float) -> jax.Array:
  """1 / rms of `width` values whose squares sum to `squares`; for kernels, too, which have a row by itself."""
  return jax.lax.rsqrt(squares / width + eps)
