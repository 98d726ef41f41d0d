"""The model one chunk of tokens at a time, with a cache of what attention needs of the tokens before.

MLA caches the latent and the rotary key, C + R numbers per token and layer, and multiplies the keys' and values'
up-projections into queries and outputs instead ("absorbed"; arXiv 2405.04434, section 2.1.2): a prompt's chunk, a
decoded token and a few drafted ones take the same path. Plain attention caches keys and values.

Everything runs inside `jax.shard_map` over the mesh of `moe.mesh`, as training does: heads, hidden width and vocabulary
are sharded over `tensor`, sequences over (`data`, `expert`), experts over `expert`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.config import Config, ModelConfig
from moe.inference.quantize import is_quantized
from moe.mesh import BATCH_AXES
from moe.model import dispatch, transformer
from moe.model.norm import rms_norm
from moe.model.rope import angles, softmax_scale, turn
from moe.model.router import route_logits
from moe.ops import few_rows, grouped_matmul, latent_attention, weights
from moe.ops.cross_entropy import mask_padding
from moe.ops.varying import align, vary

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
  for layer_w, layer_cache in zip(w['layers'], cache, strict=True):
    x_BSD, layer_cache = layer(layer_w, layer_cache, x_BSD, chunk, config)
    found.append(layer_cache)
  return x_BSD, tuple(found)


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
  return layer(module['layer'], cache, x_BSD, chunk, config)


def logits(w: dict, normed_XD: jax.Array, config: ModelConfig) -> jax.Array:
  """float32 logits of normed hidden states over the whole (padded) vocabulary, on every shard of `tensor`: [..., V]."""
  w_head_DV = w['w_embedding_VD'].T if config.tie_embeddings else w['w_head_DV']
  part_XV = mask_padding(jnp.dot(normed_XD, w_head_DV, preferred_element_type=jnp.float32), config.vocab_size)
  shards, width = lax.axis_size('tensor'), part_XV.shape[-1]
  # A sum over shards rather than a gather, whose result counts as differing between shards.
  whole_XV = jnp.zeros((*part_XV.shape[:-1], shards * width), part_XV.dtype)
  whole_XV, part_XV, at = align(whole_XV, part_XV, lax.axis_index('tensor') * width)
  return lax.psum(lax.dynamic_update_slice_in_dim(whole_XV, part_XV, at, -1), 'tensor')


def layer(w: dict, cache, x_BSD, chunk: Chunk, config: Config):
  """One layer, dense or with experts: (residual stream, cache)."""
  eps = config.model.norm_eps
  attention = mla if config.model.attention == 'mla' else mha
  normed_BSD = rms_norm(x_BSD, w['scale_attention_D'], eps)
  y_BSD, cache = attention(w['attention'], cache, normed_BSD, chunk, config.model)
  x_BSD = x_BSD + lax.psum(y_BSD, 'tensor')
  h_TD = rms_norm(x_BSD, w['scale_ffn_D'], eps).reshape(-1, x_BSD.shape[-1])
  if 'experts' in w:
    y_TD = routed(w, h_TD, chunk.valid_BS.reshape(-1), config)
    if 'shared' in w:
      y_TD = y_TD + feed_forward(w['shared'], h_TD)
  else:
    y_TD = feed_forward(w['ffn'], h_TD)
  return x_BSD + lax.psum(y_TD, 'tensor').reshape(x_BSD.shape), cache


def mla(w: dict, cache_BSC, x_BSD, chunk: Chunk, model: ModelConfig):
  """This tensor shard's part of MLA's output [B, S, D], and the cache."""
  C, N, R = model.kv_lora_rank, model.qk_nope_dim, model.qk_rope_dim
  down_BSF = project(x_BSD, w['w_in_DF'])
  query, latent_BSC, rope_BSR = jnp.split(down_BSF, [down_BSF.shape[-1] - C - R, down_BSF.shape[-1] - R], axis=-1)
  if model.q_lora_rank:
    query = project(rms_norm(query, w['scale_query_A'], model.norm_eps), w['w_query_AHN'])
  q_BSHN = in_heads(query, N + R)
  latent_BSC = rms_norm(latent_BSC, w['scale_kv_C'], model.norm_eps)
  rope_BSR = turn(rope_BSR[:, :, None], chunk.cos_BSR, chunk.sin_BSR)[:, :, 0]
  new_BSC = shared_by_shards(jnp.concatenate([latent_BSC, rope_BSR], axis=-1))
  cache_BSC = write(cache_BSC, new_BSC, chunk)
  q_rope_BSHR = turn(q_BSHN[..., N:], chunk.cos_BSR, chunk.sin_BSR)
  q_BSHC = jnp.concatenate([jnp.einsum('bshn,chn->bshc', q_BSHN[..., :N], w['w_key_CHN']), q_rope_BSHR], axis=-1)
  out_BSHC = latent_attention.attend(q_BSHC, cache_BSC, chunk.position_BS, softmax_scale(model), C)
  out_BSHU = jnp.einsum('bshc,chu->bshu', out_BSHC, w['w_value_CHU'])
  return project(out_BSHU.reshape(*x_BSD.shape[:2], -1), w['w_out_HUD']), cache_BSC


def mha(w: dict, cache, x_BSD, chunk: Chunk, model: ModelConfig):
  """The same for plain multi-head attention, whose cache are keys and values."""
  R, U = model.qk_rope_dim, model.v_dim
  in_BSF = project(x_BSD, w['w_in_DF'])
  heads = in_BSF.shape[-1] // (2 * R + U)
  query, key, value = jnp.split(in_BSF, [heads * R, 2 * heads * R], axis=-1)
  q_BSHR, k_BSHR = (turn(in_heads(a, R), chunk.cos_BSR, chunk.sin_BSR) for a in (query, key))
  keys, values = write(cache[0], k_BSHR, chunk), write(cache[1], in_heads(value, U), chunk)
  out_BSHU = attend(q_BSHR, keys, values, chunk, softmax_scale(model))
  return project(out_BSHU.reshape(*x_BSD.shape[:2], -1), w['w_out_HUD']), (keys, values)


def shared_by_shards(a) -> jax.Array:
  """What every shard of `tensor` has computed alike, also as its type: the sum of one shard's and of zeros."""
  return lax.psum(jnp.where(lax.axis_index('tensor') == 0, a, 0), 'tensor')


def write(cache, new_BSX, chunk: Chunk):
  """`cache` [B, capacity, ...] with the chunk's valid rows at their positions."""
  row_B1 = jnp.arange(len(cache))[:, None]
  position_BS = jnp.where(chunk.valid_BS, chunk.position_BS, cache.shape[1])  # past the end: dropped
  return cache.at[row_B1, position_BS].set(new_BSX.astype(cache.dtype), mode='drop')


def attend(q_BSHR, keys, values, chunk: Chunk, scale: float) -> jax.Array:
  """softmax(scale * q k^T) v over the cached positions up to each query's own: [B, S, H, U]."""
  scores_BHST = jnp.einsum('bshr,bthr->bhst', q_BSHR, keys, preferred_element_type=jnp.float32) * scale
  seen_BST = jnp.arange(keys.shape[1]) <= chunk.position_BS[..., None]
  probs_BHST = jax.nn.softmax(jnp.where(seen_BST[:, None], scores_BHST, -1e30), axis=-1).astype(values.dtype)
  return jnp.einsum('bhst,bthu->bshu', probs_BHST, values)


def project(x, w) -> jax.Array:
  """x [..., K] times w, whose axes are flattened to [K, N] if it is an array of more."""
  K = x.shape[-1]
  y = dense(x.reshape(-1, K), w if is_quantized(w) else w.reshape(K, -1))
  return y.reshape(*x.shape[:-1], -1)


def in_heads(x, width: int) -> jax.Array:
  """x [..., H * width] as [..., H, width]."""
  return x.reshape(*x.shape[:-1], -1, width)


def feed_forward(w: dict, x_TD) -> jax.Array:
  """This tensor shard's part of a dense SwiGLU."""
  if len(x_TD) <= FEW_DENSE:
    return few_rows.dense(few_rows.dense_swiglu(x_TD, w['w_gate_DF'], w['w_up_DF']), w['w_down_FD'])
  return dense(jax.nn.silu(dense(x_TD, w['w_gate_DF'])) * dense(x_TD, w['w_up_DF']), w['w_down_FD'])


def dense(x_TD, w) -> jax.Array:
  """x times a matrix, quantised or not."""
  return few_rows.dense(x_TD, w) if len(x_TD) <= FEW_DENSE else x_TD @ weights.dequantize(w, x_TD.dtype)


def routed(w: dict, h_TD, valid_T, config: Config) -> jax.Array:
  """This tensor shard's part of the routed experts' output, dropless."""
  model, experts = config.model, w['experts']
  multiplicative = config.balance.bias_rule == 'multiplicative'
  logits_TE = few_rows.dense(h_TD.astype(jnp.float32), w['w_router_DE'])
  routing = route_logits(logits_TE, w['bias_E'], valid_T, model, multiplicative, dropless=True)
  gate, up, down = experts['w_gate_eDF'], experts['w_up_eDF'], experts['w_down_eFD']
  assignments, held = routing.expert_TK.size, weights.shape_of(gate)[0]
  if lax.axis_size('expert') == 1 and few_rows.as_each(assignments, held):  # nothing is sent, and nothing sorted
    expert_M = jnp.where(routing.keep_TK, routing.expert_TK, held).ravel()
    y_MD = few_rows.matmul_each(few_rows.swiglu_each(h_TD, gate, up, expert_M), down, expert_M)
    y_TKD = y_MD.reshape(*routing.expert_TK.shape, -1)
    return (y_TKD * routing.weight_TK[..., None]).sum(1).astype(h_TD.dtype)
  backend = dispatch.BACKENDS[config.dispatch]
  few = assignments <= FEW * model.num_experts
  multiple = 1 if few else grouped_matmul.ROW_MULTIPLES[config.grouped_matmul]
  x_MD, size_e, plan = backend.dispatch(vary(h_TD, ('tensor',)), routing, model, True, multiple)
  if few:
    return backend.combine(few_rows.matmul(few_rows.swiglu(x_MD, gate, up, size_e), down, size_e), plan)
  product = lambda x, w: grouped_matmul.grouped_matmul(
    x, weights.dequantize(w, x.dtype), size_e, config.grouped_matmul, multiple
  )
  return backend.combine(product(jax.nn.silu(product(x_MD, gate)) * product(x_MD, up), down), plan)
