"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1) and plain multi-head attention.

Heads are sharded over `tensor`; latents are computed on every tensor shard. Both return this shard's part of the
output: the caller sums it over `tensor`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe.config import ModelConfig
from moe.model.norm import rms_norm
from moe.model.parameters import Init
from moe.model.rope import rotate, softmax_scale
from moe.ops.varying import align


@functools.partial(jax.checkpoint, static_argnums=4)
def attend(q_BSHN, k_BSHN, v_BSHU, segment_BS, scale: float):
  """Causal softmax attention inside each segment, in float32 inside: [B, S, H, U].

  Recomputed in the backward pass: storing [B, H, S, S] costs more time than the two products that make it again.
  """
  logits_BHSS = jnp.einsum('bqhn,bkhn->bhqk', q_BSHN, k_BSHN, preferred_element_type=jnp.float32) * scale
  S = segment_BS.shape[1]
  visible_BSS = (segment_BS[:, :, None] == segment_BS[:, None, :]) & (jnp.arange(S)[:, None] >= jnp.arange(S))
  probs_BHSS = jax.nn.softmax(jnp.where(visible_BSS[:, None], logits_BHSS, -1e30), axis=-1)
  return jnp.einsum('bhqk,bkhu->bqhu', probs_BHSS.astype(v_BSHU.dtype), v_BSHU)


class LatentAttention(nnx.Module):
  """MLA. Queries come through a latent of rank A, or straight from D when q_lora_rank is 0."""

  def __init__(self, config: ModelConfig, init: Init):
    D, H, C = config.d_model, config.num_heads, config.kv_lora_rank
    N, R, U, A = config.qk_nope_dim, config.qk_rope_dim, config.v_dim, config.q_lora_rank
    self.config = config
    if A:
      self.w_query_down_DA = init.normal(D, A)
      self.scale_query_A = init.ones(A)
      self.w_query_AHN = init.normal(A, H, N)
      self.w_query_rope_AHR = init.normal(A, H, R)
    else:
      self.w_query_DHN = init.normal(D, H, N)
      self.w_query_rope_DHR = init.normal(D, H, R)
    self.w_kv_down_DC = init.normal(D, C)
    self.w_key_rope_DR = init.normal(D, R)
    self.scale_kv_C = init.ones(C)
    self.w_key_CHN = init.normal(C, H, N)
    self.w_value_CHU = init.normal(C, H, U)
    self.w_out_HUD = init.normal(H, U, D)

  def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array) -> jax.Array:
    """This tensor shard's part of the output, [B, S, D]."""
    config = self.config
    if config.q_lora_rank:
      latent_BSA = rms_norm(x_BSD @ self.w_query_down_DA[...], self.scale_query_A[...], config.norm_eps)
      query, w_nope, w_rope = latent_BSA, self.w_query_AHN[...], self.w_query_rope_AHR[...]
    else:
      query, w_nope, w_rope = x_BSD, self.w_query_DHN[...], self.w_query_rope_DHR[...]
    q_nope_BSHN = jnp.einsum('bsd,dhn->bshn', query, w_nope)
    q_rope_BSHR = rotate(jnp.einsum('bsd,dhr->bshr', query, w_rope), config)
    latent_BSC = rms_norm(x_BSD @ self.w_kv_down_DC[...], self.scale_kv_C[...], config.norm_eps)
    k_nope_BSHN = jnp.einsum('bsc,chn->bshn', latent_BSC, self.w_key_CHN[...])
    # One rotary key for all heads, cast before it is copied, so that its gradient is summed over `tensor` once.
    k_rope_BS1R = rotate((x_BSD @ self.w_key_rope_DR[...])[:, :, None], config)
    k_rope_BSHR = jnp.broadcast_to(align(k_rope_BS1R, q_rope_BSHR)[0], q_rope_BSHR.shape)
    v_BSHU = jnp.einsum('bsc,chu->bshu', latent_BSC, self.w_value_CHU[...])
    q = jnp.concatenate([q_nope_BSHN, q_rope_BSHR], axis=-1)
    k = jnp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1)
    out_BSHU = attend(q, k, v_BSHU, segment_BS, softmax_scale(config))
    return jnp.einsum('bshu,hud->bsd', out_BSHU, self.w_out_HUD[...])


class MultiHeadAttention(nnx.Module):
  """Plain multi-head attention with rotary positions over the whole head, as the loss-free paper's models use."""

  def __init__(self, config: ModelConfig, init: Init):
    D, H, R, U = config.d_model, config.num_heads, config.qk_rope_dim, config.v_dim
    self.config = config
    self.w_query_DHR = init.normal(D, H, R)
    self.w_key_DHR = init.normal(D, H, R)
    self.w_value_DHU = init.normal(D, H, U)
    self.w_out_HUD = init.normal(H, U, D)

  def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array) -> jax.Array:
    """This tensor shard's part of the output, [B, S, D]."""
    q_BSHR = rotate(jnp.einsum('bsd,dhr->bshr', x_BSD, self.w_query_DHR[...]), self.config)
    k_BSHR = rotate(jnp.einsum('bsd,dhr->bshr', x_BSD, self.w_key_DHR[...]), self.config)
    v_BSHU = jnp.einsum('bsd,dhu->bshu', x_BSD, self.w_value_DHU[...])
    out_BSHU = attend(q_BSHR, k_BSHR, v_BSHU, segment_BS, softmax_scale(self.config))
    return jnp.einsum('bshu,hud->bsd', out_BSHU, self.w_out_HUD[...])


ATTENTIONS = {'mla': LatentAttention, 'mha': MultiHeadAttention}
