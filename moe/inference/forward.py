"""The model one chunk of tokens at a time, with a cache of what attention needs of the tokens before.

MLA caches the latent and the rotary key, C + R numbers per token and layer, and multiplies the keys' and values'
up-projections into queries and outputs instead ("absorbed"; arXiv 2405.04434, section 2.1.2): a prompt's chunk, a
decoded token and a few drafted ones take the same path. Plain attention caches keys and values.

Everything runs inside `jax.shard_map` over the mesh of `moe.parallel.mesh`, as training does: heads, hidden width and
vocabulary are sharded over `tensor`, sequences over (`data`, `expert`), experts over `expert`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.config import Config, ModelConfig
from moe.inference.quantize import is_quantized
from moe.model import dispatch, transformer
from moe.model.norm import LATENT_EPS, rms_norm
from moe.model.rope import angles, softmax_scale, turn
from moe.model.router import choose, route_logits
from moe.ops import grouped_matmul, weights
from moe.ops.cross_entropy import mask_padding
from moe.ops.decode import few_rows, latent_attention, latent_inputs_gpu
from moe.ops.decode.add_norm import Stream, Sum, add_norm
from moe.ops.decode.latent_inputs_gpu import Inputs
from moe.ops.varying import align, vary, varying_axes
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved

# Rows, per expert and of a dense product, up to which kernels stream each matrix once rather than fill tensor cores.
FEW, FEW_DENSE = 16, 64


class Chunk(NamedTuple):
  """Tokens to run: position_BS in their sequences, valid_BS, and the rotary angles there."""

  position_BS: jax.Array
  valid_BS: jax.Array
  cos_BSR: jax.Array
  sin_BSR: jax.Array


def cache_shapes(config: Config, slots: int, capacity: int, mtp: bool) -> tuple:
  """ShapeDtypeStructs of the cache, [slots, capacity, ...]: one per layer, and one of the first MTP module if `mtp`."""
  model, dtype = config.model, jnp.dtype(config.precision.compute)
  shape = lambda *rest: jax.ShapeDtypeStruct((slots, capacity, *rest), dtype)
  if model.attention == 'mla':
    one = shape(model.kv_lora_rank + model.qk_rope_dim)
  else:
    one = shape(model.num_heads, model.qk_rope_dim), shape(model.num_heads, model.v_dim)
  return (one,) * (model.num_layers + mtp)


def cache_specs(config: Config, mtp: bool) -> tuple:
  """The PartitionSpec of each of `cache_shapes`."""
  one = P(BATCH_AXES) if config.model.attention == 'mla' else (P(BATCH_AXES, None, 'tensor'),) * 2
  return (one,) * (config.model.num_layers + mtp)


def chunk_at(length_B: jax.Array, valid_BS: jax.Array, capacity: int, config: ModelConfig) -> Chunk:
  """The chunk whose row b starts at position length_B[b]."""
  position_BS = length_B[:, None] + jnp.arange(valid_BS.shape[1])
  cos, sin = (jnp.asarray(table).at[position_BS].get(mode='clip') for table in angles(capacity, config))
  return Chunk(position_BS, valid_BS, cos, sin)


def run(w: dict, cache: tuple, token_BS: jax.Array, chunk: Chunk, config: Config) -> tuple[jax.Array, tuple]:
  """The main model on a chunk.

  Args:
    w: from `weights.prepare`, as sharded.
    cache: of the main model's layers, see `cache_shapes`.

  Returns:
    h_BSD before the final norm, and the cache with the chunk's valid tokens in it.
  """
  x_BSD, found = transformer.embed_tokens(w['w_embedding_VD'], token_BS), []
  stream = Stream(x_BSD.reshape(-1, x_BSD.shape[-1]))
  for layer_w, layer_cache in zip(w['layers'], cache, strict=True):
    stream, layer_cache = layer(layer_w, layer_cache, stream, chunk, config)
    found.append(layer_cache)
  return stream.total().reshape(x_BSD.shape), tuple(found)


def run_mtp(w: dict, depth: int, cache, hidden_BSD, next_token_BS, chunk: Chunk, config: Config):
  """MTP module `depth` (from 0) on a chunk; see `transformer.mtp_hidden`.

  Args:
    hidden_BSD: state before it, after that one's final norm.

  Returns:
    Its hidden state, before its norm, and its cache.
  """
  module, eps = w['mtp'][depth], config.model.norm_eps
  hidden_BSD = rms_norm(hidden_BSD, module['scale_hidden_D'], eps)
  embedded_BSD = transformer.embed_tokens(w['w_embedding_VD'], next_token_BS)
  embedded_BSD = rms_norm(embedded_BSD, module['scale_embedding_D'], eps)
  x_BSD = hidden_BSD @ module['w_hidden_DD'] + embedded_BSD @ module['w_embedding_DD']
  stream, cache = layer(module['layer'], cache, Stream(x_BSD.reshape(-1, x_BSD.shape[-1])), chunk, config)
  return stream.total().reshape(x_BSD.shape), cache


def logits(w: dict, normed_XD: jax.Array, config: ModelConfig) -> jax.Array:
  """float32 logits of normed hidden states over the whole (padded) vocabulary, on every shard of `tensor`: [..., V]."""
  w_head_DV = w['w_embedding_VD'].T if config.tie_embeddings else w['w_head_DV']
  part_XV = mask_padding(jnp.dot(normed_XD, w_head_DV, preferred_element_type=jnp.float32), config.vocab_size)
  shards, width = lax.axis_size('tensor'), part_XV.shape[-1]
  # A sum over shards rather than a gather, whose result counts as differing between shards.
  whole_XV = jnp.zeros((*part_XV.shape[:-1], shards * width), part_XV.dtype)
  whole_XV, part_XV, at = align(whole_XV, part_XV, lax.axis_index('tensor') * width)
  return lax.psum(lax.dynamic_update_slice_in_dim(whole_XV, part_XV, at, -1), 'tensor')


def layer(w: dict, cache, stream: Stream, chunk: Chunk, config: Config) -> tuple[Stream, tuple]:
  """One layer, dense or with experts, of all tokens T = B * S: the residual stream and the cache."""
  eps = config.model.norm_eps
  attention = mla if config.model.attention == 'mla' else mha
  x_TD, normed_TD = add_norm(stream, w['scale_attention_D'], eps)
  parts_PTD, cache = attention(w['attention'], cache, normed_TD, chunk, config.model)
  x_TD, h_TD = add_norm(Stream(x_TD, (over_shards(Sum(parts_PTD), x_TD.dtype),)), w['scale_ffn_D'], eps)
  if 'experts' in w:
    sums = routed(w, h_TD, chunk.valid_BS.reshape(-1), config)
    if 'shared' in w:
      sums += (Sum(feed_forward(*feed_forward_weights(w['shared']), h_TD)),)
  else:
    sums = (Sum(feed_forward(*feed_forward_weights(w['ffn']), h_TD)),)
  return Stream(x_TD, tuple(over_shards(one, x_TD.dtype) for one in sums)), cache


def over_shards(part: Sum, dtype) -> Sum:
  """The sum over shards of `tensor`, each rounded to `dtype`. Of one its parts stay, and only types change."""
  if lax.axis_size('tensor') == 1:
    return part._replace(parts_PMD=lax.psum(part.parts_PMD, 'tensor'))
  return Sum(lax.psum(part.total().astype(dtype), 'tensor')[None])


def mla(w: dict, cache_BTW, x_TD, chunk: Chunk, model: ModelConfig):
  """This tensor shard's part of MLA's output, as parts [P, T, D], and the cache."""
  down_PTF = query_PTQ = project(x_TD, w['w_in_DF'])
  if model.q_lora_rank:
    query_TA = down_PTF.sum(0)[:, : model.q_lora_rank].astype(x_TD.dtype)
    query_PTQ = project(rms_norm(query_TA, w['scale_query_A'], LATENT_EPS), w['w_query_AHN'])
  rows_BS = rows_to_write(cache_BTW, chunk)
  inputs = Inputs(
    query_PTQ, down_PTF, w['w_key_CHN'], w['scale_kv_C'], chunk.cos_BSR, chunk.sin_BSR, rows_BS, cache_BTW
  )
  absorb = lambda *inputs: absorbed(Inputs(*inputs), LATENT_EPS)
  if lax.axis_size('tensor') == 1 and len(x_TD) <= latent_inputs_gpu.FEW_TOKENS:
    on_gpu = lambda *inputs: latent_inputs_gpu.absorb(Inputs(*inputs), LATENT_EPS)
    q_BSHW, cache_BTW = lax.platform_dependent(*align(*inputs), cuda=on_gpu, default=absorb)
    cache_BTW = lax.psum(cache_BTW, 'tensor')  # for its type's sake: there is one shard
  else:
    q_BSHW, cache_BTW = absorbed(inputs, LATENT_EPS)
  out_BSHU = latent_attention.attend(q_BSHW, cache_BTW, chunk.position_BS, w['w_value_CHU'], softmax_scale(model))
  return project(out_BSHU.reshape(len(x_TD), -1), w['w_out_HUD']), cache_BTW


def absorbed(inputs: Inputs, eps: float):
  """`latent_inputs_gpu.absorb` for any number of tokens, anywhere, on any number of shards of `tensor`."""
  (B, S), (C, H, N), cache_BTW = inputs.position_BS.shape, inputs.w_key_CHN.shape, inputs.cache_BTW
  R, dtype = cache_BTW.shape[2] - C, cache_BTW.dtype
  summed = lambda parts_PTF: parts_PTF.sum(0).astype(dtype).reshape(B, S, -1)
  turned = lambda x_BSHR: turn(x_BSHR, inputs.cos_BSR, inputs.sin_BSR)
  down_BSF = summed(inputs.down_PTF)
  q_BSHN = in_heads(summed(inputs.query_PTQ)[..., : H * (N + R)], N + R)
  latent_BSC, rope_BSR = jnp.split(down_BSF[..., -C - R :], [C], axis=-1)
  latent_BSC = rms_norm(latent_BSC, inputs.scale_C, eps)
  new_BSW = jnp.concatenate([latent_BSC, turned(rope_BSR[:, :, None])[:, :, 0]], axis=-1)
  if not varying_axes(cache_BTW) >= varying_axes(new_BSW):  # every shard of `tensor` has computed these alike
    new_BSW = lax.psum(jnp.where(lax.axis_index('tensor') == 0, new_BSW, 0), 'tensor')
  absorbed_BSHC = jnp.einsum('bshn,chn->bshc', q_BSHN[..., :N], inputs.w_key_CHN)
  q_BSHW = jnp.concatenate([absorbed_BSHC, turned(q_BSHN[..., N:])], axis=-1)
  return q_BSHW, write(cache_BTW, new_BSW, inputs.position_BS)


def mha(w: dict, cache, x_TD, chunk: Chunk, model: ModelConfig):
  """The same for plain multi-head attention, whose cache are keys and values."""
  R, U = model.qk_rope_dim, model.v_dim
  in_BSF = project(x_TD, w['w_in_DF']).sum(0).astype(x_TD.dtype).reshape(*chunk.position_BS.shape, -1)
  heads = in_BSF.shape[-1] // (2 * R + U)
  query, key, value = jnp.split(in_BSF, [heads * R, 2 * heads * R], axis=-1)
  q_BSHR, k_BSHR = (turn(in_heads(a, R), chunk.cos_BSR, chunk.sin_BSR) for a in (query, key))
  rows_BS = rows_to_write(cache[0], chunk)
  keys, values = write(cache[0], k_BSHR, rows_BS), write(cache[1], in_heads(value, U), rows_BS)
  out_BSHU = attend(q_BSHR, keys, values, chunk, softmax_scale(model))
  return project(out_BSHU.reshape(len(x_TD), -1), w['w_out_HUD']), (keys, values)


def rows_to_write(cache, chunk: Chunk) -> jax.Array:
  """int32 [B, S] rows of `cache` [B, capacity, ...] for the chunk's tokens; for those not valid, past the end."""
  return jnp.where(chunk.valid_BS, chunk.position_BS, cache.shape[1])


def write(cache, new_BSX, position_BS):
  """`cache` [B, capacity, ...] with rows at their positions; those past the end are dropped."""
  row_B1 = jnp.arange(len(cache))[:, None]
  return cache.at[row_B1, position_BS].set(new_BSX.astype(cache.dtype), mode='drop')


def attend(q_BSHR, keys, values, chunk: Chunk, scale: float) -> jax.Array:
  """softmax(scale * q k^T) v over the cached positions up to each query's own: [B, S, H, U]."""
  scores_BHST = jnp.einsum('bshr,bthr->bhst', q_BSHR, keys, preferred_element_type=jnp.float32) * scale
  seen_BST = jnp.arange(keys.shape[1]) <= chunk.position_BS[..., None]
  probs_BHST = jax.nn.softmax(jnp.where(seen_BST[:, None], scores_BHST, -1e30), axis=-1).astype(values.dtype)
  return jnp.einsum('bhst,bthu->bshu', probs_BHST, values)


def project(x_TK, w) -> jax.Array:
  """x times w, whose axes are flattened to [K, N] if it is an array of more: parts [P, T, N] that add up to that."""
  w = w if is_quantized(w) else w.reshape(x_TK.shape[-1], -1)
  return few_rows.parts_dense(x_TK, w) if len(x_TK) <= FEW_DENSE else dense(x_TK, w)[None]


def in_heads(x, width: int) -> jax.Array:
  """x [..., H * width] as [..., H, width]."""
  return x.reshape(*x.shape[:-1], -1, width)


def feed_forward_weights(w: dict) -> tuple:
  """Gate, up and down projection of a dense SwiGLU."""
  return w['w_gate_DF'], w['w_up_DF'], w['w_down_FD']


def feed_forward(gate, up, down, x_TD, expert: int | None = None) -> jax.Array:
  """This tensor shard's part of a dense SwiGLU, as parts [P, T, D]; of one expert's matrices if they are several."""
  if len(x_TD) <= FEW_DENSE:
    return few_rows.feed_forward_dense(x_TD, gate, up, down, expert)
  gate, up, down = few_rows.matrix((gate, up, down), expert)
  return dense(jax.nn.silu(dense(x_TD, gate)) * dense(x_TD, up), down)[None]


def dense(x_TD, w) -> jax.Array:
  """Many rows times a matrix, quantised or not."""
  return x_TD @ weights.dequantize(w, x_TD.dtype)


def routed(w: dict, h_TD, valid_T, config: Resolved) -> tuple[Sum, ...]:
  """This tensor shard's part of the output of the routed experts, dropless, and of the shared one that is with them."""
  model, experts = config.model, w['experts']
  multiplicative = config.balance.bias_rule == 'multiplicative'
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
    return product(jax.nn.silu(product(x_MD, gate)) * product(x_MD, up), down)

  precision = dataclasses.replace(config.precision, fp8='')  # rows travel as they are computed with
  settings = dataclasses.replace(config, row_multiple=multiple, dropless=True, precision=precision)
  backend = dispatch.BACKENDS[config.dispatch]
  routed_sum = Sum(backend.apply(vary(h_TD, ('tensor',)), routing, through_experts, settings)[None])
  return (routed_sum, Sum(feed_forward(gate, up, down, h_TD, held - 1))) if joined else (routed_sum,)
