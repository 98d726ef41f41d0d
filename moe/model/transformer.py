"""The whole model as three pure functions, so that a pipeline stage is a slice of the stacked layers:

    embed   tokens -> residual stream, through the leading dense layers
    stack   the MoE layers, scanned
    head    residual stream -> logits (and `mtp_hidden` for the multi-token-prediction modules)

All run inside `jax.shard_map` over the mesh of `moe.parallel.mesh`; arrays are this shard's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moe.balance import rules
from moe.balance.stats import RouterStats
from moe.config import BalanceConfig, Config, ModelConfig
from moe.model.layer import DenseLayer, MoELayer
from moe.model.parameters import Init, RouterBias
from moe.ops import attention, grouped_matmul
from moe.ops.cross_entropy import cross_entropy, cross_entropy_of_each
from moe.ops.norm import rms_norm
from moe.parallel.resolved import Resolved


class MTPModule(nnx.Module):
  """One multi-token-prediction module (arXiv 2412.19437, section 2.2)."""

  def __init__(self, config: ModelConfig, init: Init):
    D = config.d_model
    self.scale_hidden_D = init.ones(D)
    self.scale_embedding_D = init.ones(D)
    self.w_hidden_DD = init.normal(D, D)  # the halves of the paper's projection M of [hidden; embedding]
    self.w_embedding_DD = init.normal(D, D)
    self.layer = MoELayer(config, init)
    self.scale_out_D = init.ones(D)


class Transformer(nnx.Module):
  """Parameters of the model. `bias_LE` has a row per MoE layer, then one per MTP module."""

  def __init__(self, config: ModelConfig, balance: BalanceConfig, rngs: nnx.Rngs):
    self.config = config
    init = Init(rngs, config.init_std)
    stacked = Init(rngs, config.init_std, (config.num_moe_layers,))
    self.w_embedding_VD = init.normal(config.padded_vocab, config.d_model)
    self.dense_layers = nnx.List([DenseLayer(config, init) for _ in range(config.num_dense_layers)])
    self.layers = MoELayer(config, stacked)
    self.scale_out_D = init.ones(config.d_model)
    if not config.tie_embeddings:
      self.w_head_DV = init.normal(config.d_model, config.padded_vocab)
    self.mtp = nnx.List([MTPModule(config, init) for _ in range(config.mtp_depth)])
    self.bias_LE = RouterBias(rules.init(balance, config.num_routers, config.num_experts)['bias_LE'])


def remat(function, policy: str):
  """`function` recomputed in the backward pass as train.remat says.

  dots keeps the results of matrix products and what attention needs, so that only cheap things run again: norms,
  rotations, gates, activations, and copies of rows. full keeps the arguments alone.
  """
  if policy == 'none':
    return function
  return jax.checkpoint(function, policy=_is_product if policy == 'dots' else None)


_DOTS_AND_NAMED = jax.checkpoint_policies.save_from_both_policies(
  jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  jax.checkpoint_policies.save_only_these_names(attention.SAVED, grouped_matmul.SAVED),
)


def _is_product(primitive, *args, **params) -> bool:
  """A policy of jax.checkpoint: keeps matrix products, those inside kernels too, and what carries a name of ours."""
  kernel = primitive.name in ('pallas_call', 'mpmd_map', 'custom_vmap_call')  # how Pallas calls kernels, by version
  return kernel or _DOTS_AND_NAMED(primitive, *args, **params)


def embed_tokens(table_VD: jax.Array, token_BS: jax.Array) -> jax.Array:
  """Rows of the embedding, whose vocabulary is sharded over `tensor`: [B, S, D]."""
  local_BS = token_BS - lax.axis_index('tensor') * table_VD.shape[0]
  here_BS = (local_BS >= 0) & (local_BS < table_VD.shape[0])
  rows_BSD = table_VD.at[jnp.where(here_BS, local_BS, 0)].get(mode='promise_in_bounds')
  return lax.psum(jnp.where(here_BS[..., None], rows_BSD, 0), 'tensor')


def embed(model: Transformer, token_BS: jax.Array, segment_BS: jax.Array, config: Config) -> jax.Array:
  """Tokens to the residual stream that enters the MoE layers.

  Args:
    model: parameters as this shard computes with them.
    token_BS: int32 ids of this shard's sequences.
    segment_BS: int32 document ids.
    config: of the dense layers before, and train.remat.
  """
  x_BSD = embed_tokens(model.w_embedding_VD[...], token_BS)
  for layer in model.dense_layers:
    x_BSD = remat(lambda x, layer=layer: layer(x, segment_BS, config), config.train.remat)(x_BSD)
  return x_BSD


def stack(
  model: Transformer, x_BSD: jax.Array, segment_BS: jax.Array, mask_BS: jax.Array, config: Resolved
) -> tuple[jax.Array, RouterStats]:
  """The MoE layers; statistics come stacked over layers.

  Args:
    model: parameters as this shard computes with them.
    x_BSD: from `embed`.
    segment_BS: int32 document ids.
    mask_BS: bool, tokens to route and count.
    config: of the layers, and train.remat.
  """
  graph, layers = nnx.split(model.layers)
  bias_LE = model.bias_LE[...][: config.model.num_moe_layers]

  def layer(x_BSD, weights):
    state, bias_E = weights
    return nnx.merge(graph, state)(x_BSD, segment_BS, mask_BS, bias_E, config)

  return lax.scan(remat(layer, config.train.remat), x_BSD, (layers, bias_LE), unroll=config.train.unroll_layers)


def mtp_hidden(model, depth: int, h_BSD, next_token_BS, segment_BS, mask_BS, config: Resolved):
  """Hidden state of MTP module `depth` (from 0) and its router's statistics.

  The module reads the state before it after that one's final norm, as in transformers, SGLang and (the first module)
  vLLM: the paper leaves it open, and so a module that is trained here drafts well there, and the other way round.

  Args:
    model: parameters as this shard computes with them.
    depth: of the module, from 0.
    h_BSD: hidden state before it, of the main model or the module of one depth less, before any final norm.
    next_token_BS: the token depth + 1 positions ahead.
    segment_BS, mask_BS: document ids, and positions whose next_token lies in the same document.
    config: of the module's layer, and train.remat.
  """
  module, eps = model.mtp[depth], config.model.norm_eps
  scale_before_D = (model.mtp[depth - 1] if depth else model).scale_out_D[...]
  bias_E = model.bias_LE[...][config.model.num_moe_layers + depth]

  def run(h_BSD):
    embedded_BSD = embed_tokens(model.w_embedding_VD[...], next_token_BS)
    normed_BSD = rms_norm(h_BSD, scale_before_D, eps)
    x_BSD = mtp_input(lambda name: getattr(module, name)[...], normed_BSD, embedded_BSD, eps)
    return module.layer(x_BSD, segment_BS, mask_BS, bias_E, config)

  return remat(run, config.train.remat)(h_BSD)


def mtp_input(w: Callable[[str], jax.Array], normed_BSD: jax.Array, embedded_BSD: jax.Array, eps: float) -> jax.Array:
  """What an MTP module's layer reads (arXiv 2412.19437, equation 21), in the form of two products instead of one.

  Args:
    w: a name of the module's own parameters -> its array.
    normed_BSD: the state before the module, after that one's final norm.
    embedded_BSD: embedding of the next token.
    eps: of the norms.
  """
  hidden_BSD = rms_norm(normed_BSD, w('scale_hidden_D'), eps)
  embedded_BSD = rms_norm(embedded_BSD, w('scale_embedding_D'), eps)
  return hidden_BSD @ w('w_hidden_DD') + embedded_BSD @ w('w_embedding_DD')


def nats(model: Transformer, h_BSD: jax.Array, scale_D: jax.Array, target_BS: jax.Array, weight_BS: jax.Array):
  """Sum over positions of weight * cross-entropy of the head's prediction, float32.

  Args:
    model: parameters as this shard computes with them.
    h_BSD: hidden states, before the final norm.
    scale_D: of that norm: the main model's or a module's.
    target_BS: int32 token ids.
    weight_BS: bool or float, what each position counts.
  """
  return cross_entropy(*_predictions(model, h_BSD, scale_D, target_BS, weight_BS))


def nats_of_each(model: Transformer, h_BSD: jax.Array, scale_D: jax.Array, target_BS: jax.Array, weight_BS: jax.Array):
  """What `nats` returns, and the cross-entropy of each position, float32 [B, S]; for evaluation.

  Args:
    model, h_BSD, scale_D, target_BS, weight_BS: as of `nats`.
  """
  total, nats_T = cross_entropy_of_each(*_predictions(model, h_BSD, scale_D, target_BS, weight_BS))
  return total, nats_T.reshape(target_BS.shape)


def _predictions(model, h_BSD, scale_D, target_BS, weight_BS):
  """The arguments of `cross_entropy`."""
  normed = jax.checkpoint(lambda h_BSD: rms_norm(h_BSD, scale_D, model.config.norm_eps))
  h_TD = normed(h_BSD).reshape(-1, h_BSD.shape[-1])
  return h_TD, _head_weights(model), target_BS.ravel(), weight_BS.ravel(), model.config.vocab_size


def _head_weights(model):
  return model.w_embedding_VD[...].T if model.config.tie_embeddings else model.w_head_DV[...]


@functools.lru_cache(maxsize=8)
def _abstract(config: ModelConfig, balance: BalanceConfig):
  model = nnx.eval_shape(lambda: Transformer(config, balance, nnx.Rngs(0)))
  return nnx.split(model, nnx.Param, RouterBias)


@functools.lru_cache(maxsize=8)
def _abstract_layer(config: ModelConfig):
  return nnx.split(nnx.eval_shape(lambda: MoELayer(config, Init(nnx.Rngs(0), config.init_std))))


def moe_layer(config: Config, weights: dict) -> MoELayer:
  """One MoE layer with these parameters: a slice of those that `abstract_params` has under 'layers'."""
  graph, abstract = _abstract_layer(config.model)
  return nnx.merge(graph, _filled(abstract, weights))


def abstract_params(config: Config) -> dict:
  """Nested dict of the parameters' shapes and dtypes; nothing is allocated."""
  return nnx.to_pure_dict(_abstract(config.model, config.balance)[1])


def init_params(config: Config, key: jax.Array) -> dict:
  """Nested dict of fresh fp32 parameters."""
  model = Transformer(config.model, config.balance, nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.split(model, nnx.Param, RouterBias)[1])


def build(config: Config, params: dict, bias_LE: jax.Array) -> Transformer:
  """The model with these parameters and this routing bias, whatever their sharding or dtype."""
  graph, abstract, abstract_bias = _abstract(config.model, config.balance)
  return nnx.merge(graph, _filled(abstract, params), _filled(abstract_bias, {'bias_LE': bias_LE}))


def _filled(abstract, values: dict):
  """A copy of an abstract state, which is shared, with these values."""
  state = jax.tree.map(lambda x: x, abstract)
  nnx.replace_by_pure_dict(state, values)
  return state
