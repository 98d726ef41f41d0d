"""Kinds of attention, one per file, by all that depends on the kind but how generation runs it.

    mla   multi-head latent attention (arXiv 2412.19437, section 2.1.1)
    mha   plain multi-head attention, as the loss-free paper's models use

Heads are sharded over `tensor`; what they share is computed on every tensor shard. `moe.inference.attention` has the
same kinds one chunk of tokens at a time, with a cache.
"""

import abc

import jax
from flax import nnx

from moe.config import Config, ModelConfig
from moe.model.linear import linear


class Attention(abc.ABC):
  """What a kind of attention is asked. A file of this folder makes one of a subclass, as `ATTENTION`."""

  not_quantized: tuple[str, ...] = ()  # names of projections that generation needs as arrays

  @property
  @abc.abstractmethod
  def module(self) -> type[nnx.Module]:
    """module(model, init): its parameters. Called with x_BSD, segment_BS and a config, it returns this tensor shard's
    part of the output, [B, S, D]: the caller sums over `tensor`.
    """

  def check(self, model: ModelConfig) -> None:  # noqa: B027  # most have nothing to say
    """Raises UserError for sizes that the kind cannot have."""

  @abc.abstractmethod
  def parameters(self, model: ModelConfig) -> int:
    """How many parameters one layer's module has, by arithmetic: nothing is traced."""

  def score_flops(self, model: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of the forward products with keys and with values, causal, so half of seq_len on average."""
    return 2 * model.num_heads * (model.qk_nope_dim + model.qk_rope_dim + model.v_dim) * seq_len / 2

  @abc.abstractmethod
  def cache(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a token leaves in one layer's cache: name -> shape. Names end in axes, W for what all heads share."""


def project(x: jax.Array, w: jax.Array, config: Config, contracted: int = 1) -> jax.Array:
  """The last `contracted` axes of x times the first of w, in FP8 if precision.fp8 has 'attention'.

  Args:
    x: activations, [B, S, ...].
    w: a parameter, whose first `contracted` axes are the last of x.
    config: precision.fp8 and grouped_matmul, whose kernels multiply in FP8.
    contracted: axes that are summed over.
  """
  shape = x.shape[: x.ndim - contracted] + w.shape[contracted:]
  x = x.reshape(*x.shape[: x.ndim - contracted], -1)
  return linear(x, w.reshape(x.shape[-1], -1), 'attention', config).reshape(shape)
