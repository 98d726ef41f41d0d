"""Transformer layers: attention, then a dense feed-forward or routed experts, each on a normalised residual stream."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe.balance.stats import RouterStats, router_stats
from moe.config import Config, ModelConfig
from moe.model import dispatch
from moe.model.attention import ATTENTIONS
from moe.model.ffn import Experts, FeedForward
from moe.model.norm import rms_norm
from moe.model.parameters import Init
from moe.model.router import route
from moe.ops.grouped_matmul import ROW_MULTIPLES
from moe.ops.varying import vary


class DenseLayer(nnx.Module):
  """Attention and a dense feed-forward."""

  def __init__(self, config: ModelConfig, init: Init):
    self.eps = config.norm_eps
    self.scale_attention_D = init.ones(config.d_model)
    self.attention = ATTENTIONS[config.attention](config, init)
    self.scale_ffn_D = init.ones(config.d_model)
    self.ffn = FeedForward(config.d_model, config.d_ff, init)

  def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array, config: Config) -> jax.Array:
    x_BSD = attention_block(self, x_BSD, segment_BS, config)
    return x_BSD + lax.psum(self.ffn(rms_norm(x_BSD, self.scale_ffn_D[...], self.eps), config), 'tensor')


class MoELayer(nnx.Module):
  """Attention and shared + routed experts."""

  def __init__(self, config: ModelConfig, init: Init):
    self.eps = config.norm_eps
    self.scale_attention_D = init.ones(config.d_model)
    self.attention = ATTENTIONS[config.attention](config, init)
    self.scale_ffn_D = init.ones(config.d_model)
    self.w_router_DE = init.normal(config.d_model, config.num_experts)
    self.experts = Experts(config, init)
    if config.num_shared_experts:
      self.shared = FeedForward(config.d_model, config.num_shared_experts * config.d_expert, init)

  def __call__(
    self, x_BSD: jax.Array, segment_BS: jax.Array, mask_BS: jax.Array, bias_E: jax.Array, config: Config, dropless: bool
  ) -> tuple[jax.Array, RouterStats]:
    """Args: the residual stream, document ids, tokens to route and count, the routing bias, resolved backends."""
    x_BSD = attention_block(self, x_BSD, segment_BS, config)
    h_BSD = rms_norm(x_BSD, self.scale_ffn_D[...], self.eps)
    y_BSD, stats = moe_block(self, h_BSD, mask_BS, bias_E, config, dropless)
    return x_BSD + lax.psum(y_BSD, 'tensor'), stats


def attention_block(layer, x_BSD, segment_BS, config: Config):
  normed_BSD = rms_norm(x_BSD, layer.scale_attention_D[...], layer.eps)
  return x_BSD + lax.psum(layer.attention(normed_BSD, segment_BS, config), 'tensor')


def moe_block(layer: MoELayer, h_BSD, mask_BS, bias_E, config: Config, dropless: bool):
  """Router to combine: this tensor shard's part of the output, and the router's statistics."""
  h_TD = h_BSD.reshape(-1, h_BSD.shape[-1])
  multiplicative = config.balance.bias_rule == 'multiplicative'
  w_router_DE = layer.w_router_DE[...]
  routing = route(h_TD, w_router_DE, bias_E, mask_BS.reshape(-1), config.model, multiplicative, dropless)
  backend = dispatch.BACKENDS[config.dispatch]
  # Cast here, T x D values, so that their gradient is summed over `tensor` before it is spread over M rows.
  multiple = ROW_MULTIPLES[config.grouped_matmul]
  in_fp8 = 'dispatch' in config.precision.fp8_modules
  x_MD, size_e, plan = backend.dispatch(vary(h_TD, ('tensor',)), routing, config.model, dropless, multiple, in_fp8)
  y_TD = backend.combine(layer.experts(x_MD, size_e, config), plan, in_fp8)
  if config.model.num_shared_experts:
    y_TD = y_TD + layer.shared(h_TD, config)
  return y_TD.reshape(h_BSD.shape), router_stats(routing, bias_E, mask_BS, config)


def stack_stats(stats: list[RouterStats]) -> RouterStats:
  """Statistics of single routers, stacked over layers."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
