"""The head's product and the cross-entropy together, over chunks of tokens: no [T, V] array in memory.

A chunk's logits are needed for the loss and for its gradient, so when differentiated both are made in one go in the
forward pass: nothing is multiplied twice, and what is kept has the sizes of the hidden states and of the head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe.ops.masking import MASKED
from moe.ops.varying import align, vary, varying_axes

CHUNK_LOGITS = 2**26  # in float32: 256 MiB of logits at a time


def cross_entropy(h_TD: jax.Array, w_DV: jax.Array, target_T, weight_T, vocab_size: int) -> jax.Array:
  """Sum over tokens of weight * -log softmax(h w)[target], float32; inside shard_map, the vocabulary over `tensor`.

  Args:
    h_TD: hidden states, normalised.
    w_DV: this shard's columns of the head.
    target_T: int32 token ids.
    weight_T: weight of each token's loss, such as a mask; gets no gradient.
    vocab_size: columns of the head from here on are padding.
  """
  weight_T = weight_T.astype(jnp.float32)
  return _cross_entropy(*align(h_TD, vary(w_DV, ('tensor',)), target_T, weight_T), vocab_size)


def cross_entropy_of_each(h_TD: jax.Array, w_DV: jax.Array, target_T, weight_T, vocab_size: int):
  """What `cross_entropy` returns, the same number bit for bit, and -log softmax(h w)[target] of each token, float32
  [T]. Has no gradient of its own making: for evaluation.

  Args:
    h_TD, w_DV, target_T, weight_T, vocab_size: as of `cross_entropy`.
  """
  weight_T = weight_T.astype(jnp.float32)
  h_TD, w_DV, target_T, weight_T = align(h_TD, vary(w_DV, ('tensor',)), target_T, weight_T)
  nats, nats_T, _ = _over_chunks(h_TD, w_DV, target_T, weight_T, vocab_size, gradients=False)
  return nats, nats_T


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(h_TD, w_DV, target_T, weight_T, vocab_size):
  return _over_chunks(h_TD, w_DV, target_T, weight_T, vocab_size, gradients=False)[0]


def _forward(h_TD, w_DV, target_T, weight_T, vocab_size):
  nats, *gradients = _over_chunks(h_TD, w_DV, target_T, weight_T, vocab_size, gradients=True)
  return nats, gradients


def _backward(vocab_size, gradients, dnats):
  del vocab_size
  return *((dnats * gradient).astype(gradient.dtype) for gradient in gradients), None, None


_cross_entropy.defvjp(_forward, _backward)


def _over_chunks(h_TD, w_DV, target_T, weight_T, vocab_size: int, gradients: bool):
  """(summed nats, and their gradients of h and w); without gradients (summed nats, nats [T], None)."""
  (T, D), V = h_TD.shape, w_DV.shape[1]
  chunk = min(T, max(128, CHUNK_LOGITS // V // 128 * 128))
  more = -T % chunk
  in_chunks = lambda a: jnp.pad(a, ((0, more),) + ((0, 0),) * (a.ndim - 1)).reshape(-1, chunk, *a.shape[1:])
  chunks = tuple(map(in_chunks, (h_TD, target_T, weight_T)))
  nothing = jnp.zeros(()), jnp.zeros(w_DV.shape if gradients else (0,), jnp.float32)
  start = tuple(vary(a, varying_axes(h_TD)) for a in nothing)

  def step(carry, chunk):
    h_CD, target_C, weight_C = chunk
    nats_C, dlogits_CV = _chunk(h_CD, w_DV, target_C, vocab_size)
    nats, dw = carry
    nats = nats + (nats_C * weight_C).sum()
    if not gradients:
      return (nats, dw), nats_C
    dlogits_CV = (dlogits_CV * weight_C[:, None]).astype(h_CD.dtype)
    dw = dw + jnp.einsum('cd,cv->dv', h_CD, dlogits_CV, preferred_element_type=jnp.float32)
    return (nats, dw), dlogits_CV @ w_DV.T

  (nats, dw), of_each = lax.scan(step, start, chunks)
  # Each shard has summed the same nats; the mean over `tensor` says so to the type system.
  nats = lax.pmean(nats, 'tensor')
  if not gradients:
    return nats, lax.pmean(of_each.reshape(-1)[:T], 'tensor'), None
  return nats, of_each.reshape(-1, D)[:T], dw.astype(w_DV.dtype)


def _chunk(h_CD, w_DV, target_C, vocab_size: int):
  """float32 -log p(target), and its gradient by this shard's logits, p - onehot(target)."""
  logits_CV = mask_padding(jnp.einsum('cd,dv->cv', h_CD, w_DV, preferred_element_type=jnp.float32), vocab_size)
  top_C = lax.pmax(logits_CV.max(-1), 'tensor')
  exp_CV = jnp.exp(logits_CV - top_C[:, None])
  sum_C = lax.psum(exp_CV.sum(-1), 'tensor')
  here_CV = _token_ids(logits_CV.shape[1]) == target_C[:, None]
  picked_C = lax.psum(jnp.where(here_CV, logits_CV, 0).sum(-1), 'tensor')
  return jnp.log(sum_C) + top_C - picked_C, exp_CV / sum_C[:, None] - here_CV


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
  """This shard's logits [..., V] with MASKED where the vocabulary is padding."""
  return jnp.where(_token_ids(logits.shape[-1]) < vocab_size, logits, MASKED)


def _token_ids(V: int):
  return lax.axis_index('tensor') * V + jnp.arange(V)


def head_logits(h_XD: jax.Array, w_DV: jax.Array, vocab_size: int) -> jax.Array:
  """This shard's float32 logits [..., V] of normed hidden states; MASKED where the vocabulary is padding."""
  return mask_padding(jnp.dot(h_XD, w_DV, preferred_element_type=jnp.float32), vocab_size)
