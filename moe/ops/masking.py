"""Scores that must not count."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # a softmax gives it 0; less than infinite, so that a row of nothing else has no NaN


def masked_softmax(scores_XT: jax.Array, seen_XT: jax.Array) -> jax.Array:
  """softmax over the last axis of float32 scores, where `seen`, which broadcasts, is True; 0 elsewhere."""
  return jax.nn.softmax(jnp.where(seen_XT, scores_XT, MASKED), axis=-1)
