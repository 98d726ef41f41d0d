"""Plain multi-head attention with rotary positions over the whole head, as the loss-free paper's models use."""

import jax
from flax import nnx

from moe.config import Config, ModelConfig
from moe.errors import UserError
from moe.model.attention import Attention, project
from moe.model.parameters import Init
from moe.model.rope import rotate, softmax_scale
from moe.ops.attention import attend


class MultiHeadAttention(nnx.Module):
  """Queries and keys are R wide, values U."""

  def __init__(self, config: ModelConfig, init: Init):
    D, H, R, U = config.d_model, config.num_heads, config.qk_rope_dim, config.v_dim
    self.config = config
    self.w_query_DHR = init.normal(D, H, R)
    self.w_key_DHR = init.normal(D, H, R)
    self.w_value_DHU = init.normal(D, H, U)
    self.w_out_HUD = init.normal(H, U, D)

  def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array, config: Config) -> jax.Array:
    """This tensor shard's part of the output, [B, S, D]."""
    q_BSHR = rotate(project(x_BSD, self.w_query_DHR[...], config), self.config)
    k_BSHR = rotate(project(x_BSD, self.w_key_DHR[...], config), self.config)
    v_BSHU = project(x_BSD, self.w_value_DHU[...], config)
    out_BSHU = attend((q_BSHR,), (k_BSHR,), v_BSHU, segment_BS, softmax_scale(self.config))
    return project(out_BSHU, self.w_out_HUD[...], config, contracted=2)


class MultiHead(Attention):
  """Generation caches keys and values."""

  module = MultiHeadAttention

  def check(self, model):
    if model.qk_nope_dim or model.q_lora_rank:
      raise UserError(
        f"config model.attention = 'mha' rotates whole heads and has no latents: set model.qk_nope_dim = "
        f'{model.qk_nope_dim} and model.q_lora_rank = {model.q_lora_rank} to 0'
      )

  def parameters(self, model):
    return 2 * model.d_model * model.num_heads * (model.qk_rope_dim + model.v_dim)

  def cache(self, model):
    return {'key_HR': (model.num_heads, model.qk_rope_dim), 'value_HU': (model.num_heads, model.v_dim)}


ATTENTION = MultiHead()
