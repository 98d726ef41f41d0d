"""Plain multi-head attention over a cache of keys and values."""

import jax
import jax.numpy as jnp

from moe.inference.attention import CachedAttention, Chunk, in_heads, in_one, write
from moe.inference.products import project
from moe.model.rope import rotate_by, softmax_scale
from moe.ops.masking import masked_softmax


class MultiHead(CachedAttention):
  def weights(self, w):
    return in_one(w, [('w_query_DHR',), ('w_key_DHR',), ('w_value_DHU',)])

  def attend(self, w, cache, x_TD, chunk, model):
    R, U = model.qk_rope_dim, model.v_dim
    in_BSF = project(x_TD, w['w_in_DF']).sum(0).astype(x_TD.dtype).reshape(*chunk.position_BS.shape, -1)
    heads = in_BSF.shape[-1] // (2 * R + U)
    query, key, value = jnp.split(in_BSF, [heads * R, 2 * heads * R], axis=-1)
    q_BSHR, k_BSHR = (rotate_by(in_heads(a, R), chunk.cos_BSR, chunk.sin_BSR) for a in (query, key))
    rows_BS = chunk.rows_to_write(cache['key_HR'].shape[1])
    keys_BTHR, values_BTHU = (
      write(cache['key_HR'], k_BSHR, rows_BS), write(cache['value_HU'], in_heads(value, U), rows_BS)
    )  # fmt: skip
    out_BSHU = seen_before(q_BSHR, keys_BTHR, values_BTHU, chunk, softmax_scale(model))
    return project(out_BSHU.reshape(len(x_TD), -1), w['w_out_HUD']), {'key_HR': keys_BTHR, 'value_HU': values_BTHU}


def seen_before(q_BSHR, keys_BTHR, values_BTHU, chunk: Chunk, scale: float) -> jax.Array:
  """softmax(scale * q k^T) v over the cached positions up to each query's own: [B, S, H, U].

  Args:
    q_BSHR: rotated queries of the chunk, of this shard's heads.
    keys_BTHR, values_BTHU: the cache with the chunk's in it; T rows, a position each.
    chunk: where its tokens stand.
    scale: factor on the scores.
  """
  scores_BHST = jnp.einsum('bshr,bthr->bhst', q_BSHR, keys_BTHR, preferred_element_type=jnp.float32) * scale
  seen_BST = jnp.arange(keys_BTHR.shape[1]) <= chunk.position_BS[..., None]
  probs_BHST = masked_softmax(scores_BHST, seen_BST[:, None]).astype(values_BTHU.dtype)
  return jnp.einsum('bhst,bthu->bshu', probs_BHST, values_BTHU)


ATTENTION = MultiHead()
