"""Causal softmax attention inside documents, with no S x S array in memory, forward or backward.

A score is a sum of products over parts of the head: MLA's is non-rotary (N) + rotary (R), where the rotary key is one
for all heads; plain attention has one part. So head sizes stay powers of two, and no key is copied to every head.

Both implementations keep the output and the logarithm of each row's softmax sum, and make the scores again in the
backward pass (FlashAttention, arXiv 2205.14135 and 2307.08691):

    blocked  in jnp, over blocks of queries; for CPU, TPU and float32.
    triton   Pallas kernels for GPUs, bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.ops.attention import blocked, triton
from moe.ops.varying import align

SAVED = 'attention'  # name of what the backward pass needs, for policies of jax.checkpoint


def attend(queries, keys, v_BSHU: jax.Array, segment_BS: jax.Array, scale: float) -> jax.Array:
  """softmax(scale * sum over parts of q k^T) v, where position i sees j <= i of its own segment: [B, S, H, U].

  Args:
    queries: parts [B, S, H, d].
    keys: as many parts, [B, S, H, d], or [B, S, 1, d] for one that all heads share.
    v_BSHU: values.
    segment_BS: document ids; a document's positions are consecutive.
    scale: factor on the scores.
  """
  start_BS, end_BS = extents(segment_BS)
  queries, keys, v_BSHU, start_BS, end_BS = align(tuple(queries), tuple(keys), v_BSHU, start_BS, end_BS)
  return _attend(queries, keys, v_BSHU, start_BS, end_BS, scale)


def extents(segment_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int32 [B, S]: the first position of each position's document, and the position after its last."""
  S = segment_BS.shape[1]
  changes_BS = segment_BS[:, 1:] != segment_BS[:, :-1]
  position = jnp.arange(S, dtype=jnp.int32)
  start_BS = lax.cummax(jnp.where(jnp.pad(changes_BS, ((0, 0), (1, 0))), position, 0), axis=1)
  last_BS = jnp.pad(changes_BS, ((0, 0), (0, 1)), constant_values=True)
  end_BS = lax.cummin(jnp.where(last_BS, position + 1, S), axis=1, reverse=True)
  return start_BS, end_BS


def implementation(platform: str, dtype: str) -> str:
  """'triton' or 'blocked': which one runs on devices of a JAX platform, in a dtype (see `_on_platform`)."""
  return 'triton' if (platform, dtype) == ('gpu', 'bfloat16') else 'blocked'


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(queries, keys, v_BSHU, start_BS, end_BS, scale):
  return _forward(queries, keys, v_BSHU, start_BS, end_BS, scale)[0]


def _forward(queries, keys, v_BSHU, start_BS, end_BS, scale):
  forward = lambda module: functools.partial(module.forward, scale=scale)
  out_BSHU, lse_BHS = _on_platform(forward, v_BSHU.dtype, queries, keys, v_BSHU, start_BS)
  out_BSHU, lse_BHS = checkpoint_name(out_BSHU, SAVED), checkpoint_name(lse_BHS, SAVED)
  return out_BSHU, (queries, keys, v_BSHU, start_BS, end_BS, out_BSHU, lse_BHS)


def _backward(scale, saved, dout_BSHU):
  queries, keys, v_BSHU, start_BS, end_BS, out_BSHU, lse_BHS = saved
  delta_BHS = jnp.einsum('bshu,bshu->bhs', dout_BSHU, out_BSHU, preferred_element_type=jnp.float32)
  backward = lambda module: functools.partial(module.backward, scale=scale)
  dqueries, dkeys, dv_BSHU = _on_platform(
    backward, v_BSHU.dtype, queries, keys, v_BSHU, start_BS, end_BS, dout_BSHU, lse_BHS, delta_BHS
  )
  # A key that all heads share has the sum of their gradients.
  shared = lambda dkey, key: dkey if dkey.shape == key.shape else dkey.astype(jnp.float32).sum(2, keepdims=True)
  dkeys = tuple(shared(dkey, key).astype(key.dtype) for dkey, key in zip(dkeys, keys, strict=True))
  return dqueries, dkeys, dv_BSHU, None, None


_attend.defvjp(_forward, _backward)


def _on_platform(function, dtype, *operands):
  """`function(module)` of the operands, with the module for the platform the program is lowered for."""
  if dtype != jnp.bfloat16:
    return function(blocked)(*operands)
  return lax.platform_dependent(*operands, cuda=function(triton), default=function(blocked))
