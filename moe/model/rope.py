"""Rotary position embedding (arXiv 2104.09864) with YaRN context extension (arXiv 2309.00071).

Pairs are interleaved: components 2i and 2i+1 turn together, DeepSeek's order.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
  """Radians per position of each of the R/2 pairs, float64.

  With yarn_factor > 1, pairs that turn less than yarn_beta_slow times over the original length are slowed down by the
  factor, those that turn more than yarn_beta_fast times are kept, and a linear ramp over the pair's number joins them.
  """
  pairs = config.qk_rope_dim // 2
  plain = config.rope_theta ** (-np.arange(pairs) / pairs)
  if config.yarn_factor == 1:
    return plain

  def pair_that_turns(times):
    return pairs * math.log(config.yarn_original_len / (times * 2 * math.pi)) / math.log(config.rope_theta)

  low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
  high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), config.qk_rope_dim - 1)
  slowed = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0, 1)
  return plain / config.yarn_factor * slowed + plain * (1 - slowed)


def softmax_scale(config: ModelConfig) -> float:
  """1/sqrt(query-key head dim), times the square of YaRN's attention factor 0.1 m ln(yarn_factor) + 1."""
  scale = (config.qk_nope_dim + config.qk_rope_dim) ** -0.5
  if config.yarn_factor > 1:
    scale *= (0.1 * config.yarn_mscale * math.log(config.yarn_factor) + 1) ** 2
  return scale


def angles(length: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """float32 cosines and sines of every pair at positions 0..length-1, [S, R/2]; exact, unlike products in float32."""
  angle_SR = np.arange(length)[:, None] * frequencies(config)
  return np.cos(angle_SR).astype(np.float32), np.sin(angle_SR).astype(np.float32)


def rotate(x_BSHR: jax.Array, config: ModelConfig) -> jax.Array:
  """Turns each pair of the last axis by position * frequency; positions count from 0 along S."""
  return rotate_by(x_BSHR, *map(jnp.asarray, angles(x_BSHR.shape[1], config)))


def rotate_by(x_BSHR: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns each pair of the last axis by the angle of its position, in float32. cos, sin: [S, R/2] or [B, S, R/2]."""
  cos, sin = cos[..., None, :], sin[..., None, :]
  x = x_BSHR.astype(jnp.float32).reshape(*x_BSHR.shape[:-1], -1, 2)
  even, odd = x[..., 0], x[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BSHR.shape).astype(x_BSHR.dtype)
