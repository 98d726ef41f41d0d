"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1): keys and values of all heads come from one latent."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe.config import Config, ModelConfig
from moe.model.attention import Attention, project
from moe.model.parameters import Init
from moe.model.rope import rotate, softmax_scale
from moe.ops.attention import attend
from moe.ops.norm import LATENT_EPS, rms_norm
from moe.validation import at_least


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

  def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array, config: Config) -> jax.Array:
    """This tensor shard's part of the output, [B, S, D]."""
    model = self.config
    if model.q_lora_rank:
      latent_BSA = rms_norm(project(x_BSD, self.w_query_down_DA[...], config), self.scale_query_A[...], LATENT_EPS)
      query, w_nope, w_rope = latent_BSA, self.w_query_AHN[...], self.w_query_rope_AHR[...]
    else:
      query, w_nope, w_rope = x_BSD, self.w_query_DHN[...], self.w_query_rope_DHR[...]
    q_nope_BSHN = project(query, w_nope, config)
    q_rope_BSHR = rotate(project(query, w_rope, config), model)
    # Side by side as one matrix: the rotary key's product alone is too narrow for a GPU.
    w_down_DW = jnp.concatenate([self.w_kv_down_DC[...], self.w_key_rope_DR[...]], axis=1)
    down_BSC, k_rope_BSR = jnp.split(project(x_BSD, w_down_DW, config), [model.kv_lora_rank], axis=-1)
    latent_BSC = rms_norm(down_BSC, self.scale_kv_C[...], LATENT_EPS)
    k_nope_BSHN = project(latent_BSC, self.w_key_CHN[...], config)
    k_rope_BS1R = rotate(k_rope_BSR[:, :, None], model)  # one for all heads
    v_BSHU = project(latent_BSC, self.w_value_CHU[...], config)
    queries, keys = (q_nope_BSHN, q_rope_BSHR), (k_nope_BSHN, k_rope_BS1R)
    out_BSHU = attend(queries, keys, v_BSHU, segment_BS, softmax_scale(model))
    return project(out_BSHU, self.w_out_HUD[...], config, contracted=2)


class Latent(Attention):
  """Generation multiplies the keys' and values' up-projections into queries and outputs, and caches the latent."""

  module = LatentAttention
  not_quantized = 'w_key_CHN', 'w_value_CHU'  # multiplied head by head, which no kernel does in FP8

  def check(self, model):
    at_least(model, 'model', 1, 'kv_lora_rank qk_nope_dim')

  def parameters(self, model):
    D, H, C, A = model.d_model, model.num_heads, model.kv_lora_rank, model.q_lora_rank
    N, R, U = model.qk_nope_dim, model.qk_rope_dim, model.v_dim
    query = A + D * A + A * H * (N + R) if A else D * H * (N + R)
    return query + C + D * (C + R) + C * H * (N + U) + H * U * D

  def cache(self, model):
    return {'latent_W': (model.kv_lora_rank + model.qk_rope_dim,)}  # the latent, then the rotary key


ATTENTION = Latent()
