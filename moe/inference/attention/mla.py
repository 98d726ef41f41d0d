"""MLA over a cache of latents and rotary keys, C + R numbers per token and layer for all heads.

The keys' and values' up-projections are multiplied into queries and outputs instead ("absorbed"; arXiv 2405.04434,
section 2.1.2): a prompt's chunk, a decoded token and a few drafted ones take the same path.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.inference.attention import CachedAttention, in_heads, in_one, of_all_heads, side_by_side, write
from moe.inference.products import project
from moe.model.rope import rotate_by, softmax_scale
from moe.ops.decode import latent_attention, latent_inputs_gpu
from moe.ops.decode.latent_inputs_gpu import Inputs
from moe.ops.norm import LATENT_EPS, rms_norm
from moe.ops.varying import align


class Latent(CachedAttention):
  def weights(self, w):
    down = [('w_kv_down_DC',), ('w_key_rope_DR',)]
    if 'w_query_down_DA' not in w:
      return in_one(w, [('w_query_DHN', 'w_query_rope_DHR'), *down])
    up = 'w_query_AHN', 'w_query_rope_AHR'
    rest = {name: a for name, a in w.items() if name not in up} | {up[0]: side_by_side(w, up)}
    return in_one(rest, [('w_query_down_DA',), *down])

  def attend(self, w, cache, x_TD, chunk, model):
    down_PTF = query_PTQ = project(x_TD, w['w_in_DF'])
    if model.q_lora_rank:
      query_TA = down_PTF.sum(0)[:, : model.q_lora_rank].astype(x_TD.dtype)
      query_PTQ = project(rms_norm(query_TA, w['scale_query_A'], LATENT_EPS), w['w_query_AHN'])
    cache_BTW = cache['latent_W']
    rows_BS = chunk.rows_to_write(cache_BTW.shape[1])
    inputs = Inputs(
      query_PTQ, down_PTF, w['w_key_CHN'], w['scale_kv_C'], chunk.cos_BSR, chunk.sin_BSR, rows_BS, cache_BTW
    )
    if lax.axis_size('tensor') == 1 and len(x_TD) <= latent_inputs_gpu.FEW_TOKENS:
      on_gpu = lambda *inputs: latent_inputs_gpu.absorb(Inputs(*inputs), LATENT_EPS)
      plain = lambda *inputs: absorbed(Inputs(*inputs), LATENT_EPS)
      q_BSHW, cache_BTW = lax.platform_dependent(*align(*inputs), cuda=on_gpu, default=plain)
      cache_BTW = lax.psum(cache_BTW, 'tensor')  # for its type's sake: there is one shard
    else:
      q_BSHW, cache_BTW = absorbed(inputs, LATENT_EPS)
    out_BSHU = latent_attention.attend(q_BSHW, cache_BTW, chunk.position_BS, w['w_value_CHU'], softmax_scale(model))
    return project(out_BSHU.reshape(len(x_TD), -1), w['w_out_HUD']), {'latent_W': cache_BTW}


def absorbed(inputs: Inputs, eps: float) -> tuple[jax.Array, jax.Array]:
  """`latent_inputs_gpu.absorb` for any number of tokens, anywhere, on any number of shards of `tensor`."""
  (B, S), (C, H, N), cache_BTW = inputs.position_BS.shape, inputs.w_key_CHN.shape, inputs.cache_BTW
  R, dtype = cache_BTW.shape[2] - C, cache_BTW.dtype
  summed = lambda parts_PTF: parts_PTF.sum(0).astype(dtype).reshape(B, S, -1)
  rotated = lambda x_BSHR: rotate_by(x_BSHR, inputs.cos_BSR, inputs.sin_BSR)
  down_BSF = summed(inputs.down_PTF)
  q_BSHN = in_heads(summed(inputs.query_PTQ)[..., : H * (N + R)], N + R)
  latent_BSC, rope_BSR = jnp.split(down_BSF[..., -C - R :], [C], axis=-1)
  latent_BSC = rms_norm(latent_BSC, inputs.scale_C, eps)
  new_BSW = jnp.concatenate([latent_BSC, rotated(rope_BSR[:, :, None])[:, :, 0]], axis=-1)
  absorbed_BSHC = jnp.einsum('bshn,chn->bshc', q_BSHN[..., :N], inputs.w_key_CHN)
  q_BSHW = jnp.concatenate([absorbed_BSHC, rotated(q_BSHN[..., N:])], axis=-1)
  return q_BSHW, write(cache_BTW, of_all_heads(new_BSW, cache_BTW), inputs.position_BS)


ATTENTION = Latent()
