"""Attention in jnp, a block of queries at a time; keys after the block are left out."""

import jax
import jax.numpy as jnp
from jax import lax

from moe.ops.masking import MASKED

BLOCK = 512  # queries


def forward(queries, keys, v_BSHU, start_BS, scale: float) -> tuple[jax.Array, jax.Array]:
  """(out [B, S, H, U], float32 natural logarithm of the softmax sums [B, H, S]); see `moe.ops.attention.attend`.

  Args:
    queries, keys, v_BSHU, scale: as of `attend`.
    start_BS: int32, first position of each position's document.
  """
  outs, lses = [], []
  for rows, seen in _blocks(v_BSHU.shape[1]):
    scores = _scores(queries, keys, start_BS, rows, seen, scale)
    lse = jax.nn.logsumexp(scores, axis=-1)
    probs = jnp.exp(scores - lse[..., None]).astype(v_BSHU.dtype)
    outs.append(jnp.einsum('bhqk,bkhu->bqhu', probs, v_BSHU[:, seen]))
    lses.append(lse)
  return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


def backward(queries, keys, v_BSHU, start_BS, end_BS, dout_BSHU, lse_BHS, delta_BHS, scale: float):
  """Gradients of the queries' parts, the keys' parts (a row per head) and the values.

  Args:
    queries, keys, v_BSHU, start_BS, scale: as of `forward`.
    end_BS: unused here; position after the last of each position's document.
    dout_BSHU: gradient of the output.
    lse_BHS: from `forward`.
    delta_BHS: float32 sum over U of out * dout.
  """
  del end_BS
  dtype, heads = v_BSHU.dtype, v_BSHU.shape[2]
  # Where all keys are seen, `.at[:, seen].add` has an empty array of indices: one in a shard_map kills jax 0.11.
  add = lambda total, seen, part: lax.dynamic_update_slice_in_dim(total, total[:, seen] + part, 0, axis=1)
  product = lambda equation, *operands: jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
  dv = jnp.zeros_like(v_BSHU, jnp.float32)
  dkeys = [jnp.zeros_like(query, jnp.float32) for query in queries]
  dquery_blocks: list[list[jax.Array]] = [[] for _ in queries]
  for rows, seen in _blocks(v_BSHU.shape[1]):
    probs = jnp.exp(_scores(queries, keys, start_BS, rows, seen, scale) - lse_BHS[:, :, rows, None])
    dv = add(dv, seen, product('bhqk,bqhu->bkhu', probs.astype(dtype), dout_BSHU[:, rows]))
    dprobs = product('bqhu,bkhu->bhqk', dout_BSHU[:, rows], v_BSHU[:, seen])
    dscores = (probs * (dprobs - delta_BHS[:, :, rows, None]) * scale).astype(dtype)
    for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
      key = jnp.broadcast_to(key[:, seen], (*key[:, seen].shape[:2], heads, key.shape[3]))
      dquery_blocks[i].append(jnp.einsum('bhqk,bkhd->bqhd', dscores, key))
      dkeys[i] = add(dkeys[i], seen, product('bhqk,bqhd->bkhd', dscores, query[:, rows]))
  dqueries = tuple(jnp.concatenate(parts, axis=1) for parts in dquery_blocks)
  return dqueries, tuple(dkey.astype(dtype) for dkey in dkeys), dv.astype(dtype)


def _blocks(S: int):
  """(slice of queries, slice of the keys that they may see) of each block."""
  return [(slice(i, min(i + BLOCK, S)), slice(0, min(i + BLOCK, S))) for i in range(0, S, BLOCK)]


def _scores(queries, keys, start_BS, rows, seen, scale):
  """Masked float32 scores of a block, [B, H, rows, seen]."""
  total: jax.Array | int = 0
  for query, key in zip(queries, keys, strict=True):
    equation = 'bqhd,bkd->bhqk' if key.shape[2] == 1 and query.shape[2] > 1 else 'bqhd,bkhd->bhqk'
    key = key[:, seen, 0] if equation == 'bqhd,bkd->bhqk' else key[:, seen]
    total = total + jnp.einsum(equation, query[:, rows], key, preferred_element_type=jnp.float32)
  key_position, position = jnp.arange(seen.stop), jnp.arange(rows.start, rows.stop)[:, None]
  visible_BQK = (key_position >= start_BS[:, rows, None]) & (key_position <= position)
  return jnp.where(visible_BQK[:, None], total * scale, MASKED)
