"""Transformer layers: attention, then a dense feed-forward or routed experts, each on a normalised residual stream."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe.balance.stats import RouterStats, chosen, router_stats
from moe.config import Config, ModelConfig
from moe.model.dispatch import dispatch
from moe.model.ffn import Experts, FeedForward
from moe.model.parameters import Init
from moe.model.router import route
from moe.ops.norm import rms_norm
from moe.ops.varying import vary
from moe.parallel.resolved import Resolved
from moe.registry import ATTENTIONS, BIAS_RULES


class DenseLayer(nnx.Module):
  """Attention and a dense feed-forward."""

  def __init__(self, config: ModelConfig, init: Init):
    self.eps = config.norm_eps
    self.scale_attention_D = init.ones(config.d_model)
    self.attention = ATTENTIONS[config.attention].module(config, init)
    self.scale_ffn_D = init.ones(config.d_model)
    self.ffn = FeedForward(config.d_model, config.d_ff, init)

  def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array, config: Config) -> jax.Array:
    x_BSD = attention_block(self, x_BSD, segment_BS, config)
    return x_BSD + lax.psum(self.ffn(rms_norm(x_BSD, self.scale_ffn_D[...], self.eps), config), 'tensor')


class MoE(nnx.Module):
  """The mixture of experts by itself: router, routed and shared experts."""

  def __init__(self, config: ModelConfig, init: Init):
    self.w_router_DE = init.normal(config.d_model, config.num_experts)
    self.experts = Experts(config, init)
    if config.num_shared_experts:
      self.shared = FeedForward(config.d_model, config.num_shared_experts * config.d_expert, init)

  def mix(self, h_BSD, mask_BS, bias_E, config: Resolved) -> tuple[jax.Array, RouterStats]:
    """Router to combine: this tensor shard's part of the output, and the router's statistics.

    Args:
      h_BSD: this shard's tokens, normed.
      mask_BS: bool, tokens to route and count.
      bias_E: float32 routing bias.
      config: of the whole run, resolved; its axes are those around.
    """
    h_TD, tensor = h_BSD.reshape(-1, h_BSD.shape[-1]), config.axes.tensor
    multiplicative = BIAS_RULES[config.balance.bias_rule].factor
    how = config.model, multiplicative, config.dropless
    routing = route(h_TD, self.w_router_DE[...], bias_E, mask_BS.reshape(-1), *how)
    # Cast here, T x D values, so that their gradient is summed over `tensor` before it is spread over M rows.
    x_TD = vary(h_TD, (tensor,) if tensor else ())
    experts = lambda x_MD, size_e: self.experts(x_MD, size_e, config)
    y_TD = dispatch(x_TD, routing, experts, config)
    if config.model.num_shared_experts:
      y_TD = y_TD + self.shared(h_TD, config)
    stats = router_stats(routing, bias_E, mask_BS, config)
    if config.each_token:
      stats = stats._replace(chosen=chosen(routing, mask_BS))
    return y_TD.reshape(h_BSD.shape), stats


class MoELayer(MoE):
  """Attention and shared + routed experts."""

  def __init__(self, config: ModelConfig, init: Init):
    self.eps = config.norm_eps
    self.scale_attention_D = init.ones(config.d_model)
    self.attention = ATTENTIONS[config.attention].module(config, init)
    self.scale_ffn_D = init.ones(config.d_model)
    super().__init__(config, init)

  def __call__(
    self, x_BSD: jax.Array, segment_BS: jax.Array, mask_BS: jax.Array, bias_E: jax.Array, config: Resolved
  ) -> tuple[jax.Array, RouterStats]:
    """Args: the residual stream, document ids, tokens to route and count, the routing bias, resolved backends."""
    x_BSD = attention_block(self, x_BSD, segment_BS, config)
    h_BSD = rms_norm(x_BSD, self.scale_ffn_D[...], self.eps)
    y_BSD, stats = self.mix(h_BSD, mask_BS, bias_E, config)
    return x_BSD + lax.psum(y_BSD, 'tensor'), stats


def attention_block(layer, x_BSD, segment_BS, config: Config):
  """The residual stream after a layer's attention, summed over `tensor`.

  Args:
    layer: a layer of this file.
    x_BSD: this shard's residual stream.
    segment_BS: int32 document ids; no position sees another document.
    config: precision, and the model's rope and attention.
  """
  normed_BSD = rms_norm(x_BSD, layer.scale_attention_D[...], layer.eps)
  y_BSD = layer.attention(normed_BSD, segment_BS, config)
  ATTENTIONS.expect(config.model.attention, 'y_BSD', y_BSD, x_BSD.shape, x_BSD.dtype)
  return x_BSD + lax.psum(y_BSD, 'tensor')


def stack_stats(stats: list[RouterStats]) -> RouterStats:
  """Statistics of single routers, stacked over layers."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
