"""The model one chunk of tokens at a time, with a cache of what attention needs of the tokens before.

Everything runs inside `jax.shard_map` over the mesh of `moe.parallel.mesh`, as training does: heads, hidden width and
vocabulary are sharded over `tensor`, sequences over (`data`, `expert`), experts over `expert`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.config import Config, ModelConfig
from moe.errors import UserError, short
from moe.inference.attention import Chunk
from moe.inference.products import feed_forward
from moe.model import transformer
from moe.model.dispatch import dispatch
from moe.model.rope import angles
from moe.model.router import choose, route_logits
from moe.ops import grouped_matmul, weights
from moe.ops.cross_entropy import head_logits
from moe.ops.decode import few_rows
from moe.ops.decode.add_norm import Stream, Sum, add_norm
from moe.ops.swiglu import gated
from moe.ops.varying import align, vary
from moe.ops.weights import Weight
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved
from moe.parallel.sharding import axes_over
from moe.registry import ATTENTIONS, BIAS_RULES, CACHED_ATTENTIONS

FEW = 16  # rows per expert up to which kernels stream each matrix once rather than fill tensor cores


def cache_shapes(config: Config, slots: int, capacity: int, mtp: bool) -> tuple[dict, ...]:
  """ShapeDtypeStructs of the cache, [slots, capacity, ...]: a dict per layer, one more for MTP if `mtp`.

  Args:
    config: model, and precision.compute, the cache's dtype.
    slots: sequences at a time.
    capacity: the most tokens of a sequence.
    mtp: whether an MTP module drafts, and needs a cache too.
  """
  model, dtype = config.model, jnp.dtype(config.precision.compute)
  shape = lambda rest: jax.ShapeDtypeStruct((slots, capacity, *rest), dtype)
  one = {name: shape(rest) for name, rest in ATTENTIONS[model.attention].cache(model).items()}
  return (one,) * (model.num_layers + mtp)


def cache_specs(config: Config, mtp: bool) -> tuple[dict, ...]:
  """The PartitionSpec of each of `cache_shapes`."""
  model = config.model
  spec = lambda name: P(BATCH_AXES, None, *axes_over(name))
  return ({name: spec(name) for name in ATTENTIONS[model.attention].cache(model)},) * (model.num_layers + mtp)


def chunk_at(length_B: jax.Array, valid_BS: jax.Array, capacity: int, config: ModelConfig) -> Chunk:
  """The chunk whose row b starts at position length_B[b].

  Args:
    length_B: int32, tokens of each sequence that are in the cache.
    valid_BS: bool, False for padding.
    capacity: rows of the cache, and of the table of rotary angles.
    config: width and frequencies of the rotary part.
  """
  position_BS = length_B[:, None] + jnp.arange(valid_BS.shape[1])
  cos, sin = (jnp.asarray(table).at[position_BS].get(mode='clip') for table in angles(capacity, config))
  return Chunk(position_BS, valid_BS, cos, sin)


def run(w: dict, cache: tuple, token_BS: jax.Array, chunk: Chunk, config: Resolved) -> tuple[jax.Array, tuple]:
  """The main model on a chunk.

  Args:
    w: from `weights.prepare`, as sharded.
    cache: of the main model's layers, see `cache_shapes`.
    token_BS: int32 ids of this shard's sequences.
    chunk: where they stand.
    config: of the run that the weights are of, resolved.

  Returns:
    h_BSD before the final norm, and the cache with the chunk's valid tokens in it.
  """
  x_BSD, found = transformer.embed_tokens(w['w_embedding_VD'], token_BS), []
  stream = Stream(x_BSD.reshape(-1, x_BSD.shape[-1]))
  for layer_w, layer_cache in zip(w['layers'], cache, strict=True):
    stream, layer_cache = layer(layer_w, layer_cache, stream, chunk, config)
    found.append(layer_cache)
  return stream.total().reshape(x_BSD.shape), tuple(found)


def run_mtp(w: dict, depth: int, cache, hidden_BSD, next_token_BS, chunk: Chunk, config: Resolved):
  """MTP module `depth` (from 0) on a chunk; see `transformer.mtp_hidden`.

  Args:
    w, chunk, config: as of `run`.
    depth: of the module, from 0.
    cache: of the module's layer.
    hidden_BSD: state before it, after that one's final norm.
    next_token_BS: int32, the token depth + 1 positions ahead.

  Returns:
    Its hidden state, before its norm, and its cache.
  """
  module, embedded_BSD = w['mtp'][depth], transformer.embed_tokens(w['w_embedding_VD'], next_token_BS)
  x_BSD = transformer.mtp_input(module.__getitem__, hidden_BSD, embedded_BSD, config.model.norm_eps)
  stream, cache = layer(module['layer'], cache, Stream(x_BSD.reshape(-1, x_BSD.shape[-1])), chunk, config)
  return stream.total().reshape(x_BSD.shape), cache


def logits(w: dict, normed_XD: jax.Array, config: ModelConfig) -> jax.Array:
  """float32 logits of normed hidden states over the whole (padded) vocabulary, on every shard of `tensor`: [..., V]."""
  w_head_DV = w['w_embedding_VD'].T if config.tie_embeddings else w['w_head_DV']
  part_XV = head_logits(normed_XD, w_head_DV, config.vocab_size)
  shards, width = lax.axis_size('tensor'), part_XV.shape[-1]
  # A sum over shards rather than a gather, whose result counts as differing between shards.
  whole_XV = jnp.zeros((*part_XV.shape[:-1], shards * width), part_XV.dtype)
  whole_XV, part_XV, at = align(whole_XV, part_XV, lax.axis_index('tensor') * width)
  return lax.psum(lax.dynamic_update_slice_in_dim(whole_XV, part_XV, at, -1), 'tensor')


def layer(w: dict, cache, stream: Stream, chunk: Chunk, config: Resolved) -> tuple[Stream, tuple]:
  """One layer, dense or with experts, of all tokens T = B * S: the residual stream and the cache.

  Args:
    w: of the layer, as `weights.prepare` names them and sharded: 'ffn' if it is dense, else 'experts'.
    cache: of the layer.
    stream: what the layer before left, [T, D], with sums that are still to be added.
    chunk, config: as of `run`.
  """
  eps = config.model.norm_eps
  kind = config.model.attention
  x_TD, normed_TD = add_norm(stream, w['scale_attention_D'], eps)
  given = CACHED_ATTENTIONS[kind].attend(w['attention'], cache, normed_TD, chunk, config.model)
  if not (isinstance(given, tuple) and len(given) == 2):
    raise UserError(f'{CACHED_ATTENTIONS.title(kind)} must give attend() as parts and a cache, not {short(given)}')
  parts_PTD, new_cache = given
  CACHED_ATTENTIONS.expect(kind, 'attend()[0]', parts_PTD, ('P', *x_TD.shape))
  CACHED_ATTENTIONS.expect_all(kind, 'attend()[1]', new_cache, cache)
  x_TD, h_TD = add_norm(Stream(x_TD, (over_shards(Sum(parts_PTD), x_TD.dtype),)), w['scale_ffn_D'], eps)
  if 'experts' in w:
    sums = routed(w, h_TD, chunk.valid_BS.reshape(-1), config)
    if 'shared' in w:
      sums += (Sum(feed_forward(*feed_forward_weights(w['shared']), h_TD)),)
  else:
    sums = (Sum(feed_forward(*feed_forward_weights(w['ffn']), h_TD)),)
  return Stream(x_TD, tuple(over_shards(one, x_TD.dtype) for one in sums)), new_cache


def over_shards(part: Sum, dtype) -> Sum:
  """The sum over shards of `tensor`, each rounded to `dtype`. Of one its parts stay, and only types change."""
  if lax.axis_size('tensor') == 1:
    return part._replace(parts_PMD=lax.psum(part.parts_PMD, 'tensor'))
  return Sum(lax.psum(part.total().astype(dtype), 'tensor')[None])


def feed_forward_weights(w: dict) -> tuple[Weight, Weight, Weight]:
  """Gate, up and down projection of a dense SwiGLU."""
  return w['w_gate_DF'], w['w_up_DF'], w['w_down_FD']


def routed(w: dict, h_TD, valid_T, config: Resolved) -> tuple[Sum, ...]:
  """This tensor shard's part of the output of the routed experts, dropless, and of the shared one that is with them.

  Args:
    w: of the layer: 'w_router_DE', 'bias_E', 'experts' and, where it is not one of these, 'shared'.
    h_TD: this shard's tokens, normed.
    valid_T: bool, False for tokens that are not routed.
    config: model, balance.bias_rule, and the backends that 'auto' meant.
  """
  model, experts = config.model, w['experts']
  multiplicative = BIAS_RULES[config.balance.bias_rule].factor
  gate, up, down = experts['w_gate_eDF'], experts['w_up_eDF'], experts['w_down_eFD']
  joined = 'shared' not in w and model.num_shared_experts > 0  # the last expert is the shared one
  held = weights.shape_of(gate)[0]
  logits_PTE = few_rows.parts_dense(h_TD, w['w_router_DE'])
  if lax.axis_size('expert') == 1 and few_rows.as_each(len(h_TD) * (model.top_k + joined), held):
    # Nothing is sent, and nothing sorted.
    expert_TK, weight_TK = choose(logits_PTE, w['bias_E'], valid_T, model, multiplicative, joined)
    return (Sum(few_rows.feed_forward_each(h_TD, gate, up, down, expert_TK.ravel()), weight_TK),)
  routing = route_logits(logits_PTE.sum(0), w['bias_E'], valid_T, model, multiplicative, dropless=True)
  few = routing.expert_TK.size <= FEW * model.num_experts
  multiple = 1 if few else config.row_multiple

  def through_experts(x_MD, size_e):
    size_e = jnp.pad(size_e, (0, int(joined)))
    if few:
      return few_rows.matmul(few_rows.swiglu(x_MD, gate, up, size_e), down, size_e)
    product = lambda x, w: grouped_matmul.grouped_matmul(
      x, weights.dequantize(w, x.dtype), size_e, config.grouped_matmul, multiple
    )
    return product(gated(product(x_MD, gate), product(x_MD, up)), down)

  precision = dataclasses.replace(config.precision, fp8='')  # rows travel as they are computed with
  settings = dataclasses.replace(config, row_multiple=multiple, dropless=True, precision=precision)
  routed_sum = Sum(dispatch(vary(h_TD, ('tensor',)), routing, through_experts, settings)[None])
  return (routed_sum, Sum(feed_forward(gate, up, down, h_TD, held - 1))) if joined else (routed_sum,)
