"""From logits to tokens: temperature, top-k, top-p, and the draws themselves."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe.errors import UserError

LEAST_TEMPERATURE = 1e-6  # logits over less could be infinite


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen.

  temperature: of the softmax; 0 is greedy, else at least LEAST_TEMPERATURE. top_k: the most likely tokens that stay;
  0: all. top_p: of those, the fewest that hold this much probability; 1: all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature and not LEAST_TEMPERATURE <= self.temperature < float('inf'):
      raise UserError(f'temperature = {self.temperature} must be 0, which is greedy, or at least {LEAST_TEMPERATURE}')
    if self.top_k < 0:
      raise UserError(f'top_k = {self.top_k} must be at least 0; 0 keeps all tokens')
    if not 0 < self.top_p <= 1:
      raise UserError(f'top_p = {self.top_p} must be above 0 and at most 1; 1 keeps all tokens')


def distribution(logits_XV: jax.Array, how: Sampling) -> jax.Array:
  """float32 probabilities [..., V] that a token is drawn with; one-hot if greedy. Tokens tied at a limit all stay."""
  if not how.temperature:
    return jax.nn.one_hot(best(logits_XV), logits_XV.shape[-1])
  scaled_XV = logits_XV / how.temperature
  if how.top_k or how.top_p < 1:
    kept = min(how.top_k or logits_XV.shape[-1], logits_XV.shape[-1])
    best_K = lax.top_k(scaled_XV, kept)[0]
    probs_K = jax.nn.softmax(best_K, axis=-1)
    before_K = jnp.cumsum(probs_K, axis=-1) - probs_K  # held by the likelier ones: 0 for the first
    least = jnp.where(before_K < how.top_p, best_K, jnp.inf).min(-1, keepdims=True)
    scaled_XV = jnp.where(scaled_XV >= least, scaled_XV, -jnp.inf)
  return jax.nn.softmax(scaled_XV, axis=-1)


def keys(seed_B: jax.Array, position_B: jax.Array, purpose: int) -> jax.Array:
  """A key per sequence for the draw of its token at a position: the same on every mesh and in every batch."""
  one = lambda seed, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)
  return jax.vmap(one)(seed_B, position_B)


def sample(logits_BV: jax.Array, key_B: jax.Array, how: Sampling) -> tuple[jax.Array, jax.Array]:
  """int32 [B] tokens drawn from the logits' distributions, and these."""
  probs_BV = distribution(logits_BV, how)
  return draw(probs_BV, key_B) if how.temperature else best(logits_BV), probs_BV


def best(logits_XV: jax.Array) -> jax.Array:
  """int32 [...] likeliest tokens."""
  return logits_XV.argmax(-1).astype(jnp.int32)


def draw(probs_BV: jax.Array, key_B: jax.Array) -> jax.Array:
  """int32 [B] tokens drawn from `probs_BV`, which need not add up to 1."""
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, probs_BV.shape[1:]))(key_B)
  return (jnp.log(probs_BV) + noise_BV).argmax(-1).astype(jnp.int32)
