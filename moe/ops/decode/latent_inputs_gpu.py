"""From MLA's products to what attention reads, for few tokens on GPUs: absorbed queries, and new rows of the cache.

    query = [what does not turn (N), times the keys' up-projection (C) | what turns, turned (R)], per head
    row   = [latent, normed (C) | rotary key, turned (R)]

(arXiv 2405.04434, section 2.1.2.) One Pallas kernel, compiled by Triton: a program has some of a head's columns for all
tokens, and one more per token turns and norms. XLA makes five kernels of it, which take longer to start than to run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.norm import inverse_rms
from moe.ops.triton_call import call, span

FEW_TOKENS = 8  # up to which this pays: tokens are multiplied one by one
COLUMNS, WARPS = 64, 4


class Inputs(NamedTuple):
  """T = B * S tokens.

  query_PTQ: parts that add up to queries, N + R for each head, in the first columns. down_PTF: parts that add up to
  latent and rotary key in the last C + R columns. w_key_CHN: up-projection. scale_C: of the latent's norm. cos_BSR,
  sin_BSR: float32, of each pair's angle. position_BS: int32 rows of the cache to write; those past its end are not.
  cache_BTW: W = C + R.
  """

  query_PTQ: jax.Array
  down_PTF: jax.Array
  w_key_CHN: jax.Array
  scale_C: jax.Array
  cos_BSR: jax.Array
  sin_BSR: jax.Array
  position_BS: jax.Array
  cache_BTW: jax.Array


def absorb(inputs: Inputs, eps: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Queries [B, S, H, W] in the cache's dtype, and the cache with the new rows, in place where XLA lets it be."""
  (B, S, pairs), (C, H, _), cache = inputs.cos_BSR.shape, inputs.w_key_CHN.shape, inputs.cache_BTW
  tables = (table.reshape(B * S, pairs) for table in (inputs.cos_BSR, inputs.sin_BSR))
  operands = *inputs[:4], *tables, inputs.position_BS.reshape(-1), cache
  grid, anywhere = (H * pl.cdiv(C, COLUMNS) + B * S,), pl.BlockSpec(memory_space=pl.ANY)
  outs = [((B * S, H, C + 2 * pairs), cache.dtype, anywhere), (cache.shape, cache.dtype, anywhere)]
  in_place = ((len(operands) - 1, 1),)
  kernel = functools.partial(_kernel, eps=eps)
  q_THW, cache = call(kernel, grid, operands, [anywhere] * len(operands), outs, WARPS, 1, interpret, in_place)
  return q_THW.reshape(B, S, *q_THW.shape[1:]), cache


def _kernel(query, down, w_key, scale, cos, sin, position, cache_in, q_out, cache, *, eps: float):
  del cache_in  # is `cache`
  i, blocks = pl.program_id(0), pl.cdiv(w_key.shape[0], COLUMNS)
  multiplying = w_key.shape[1] * blocks

  @pl.when(i < multiplying)
  def _():
    _multiply(query, w_key, q_out, i // blocks, i % blocks * COLUMNS, w_key.shape[2] + 2 * cos.shape[1])

  @pl.when(i >= multiplying)
  def _():
    t = i - multiplying
    b, row = t // (cos.shape[0] // cache.shape[0]), position[t]
    turn = functools.partial(_turned, t=t, cos=cos, sin=sin)
    _turn_queries(query, q_out, t, w_key.shape[0], w_key.shape[2], turn)
    _write_row(down, scale, cache, (t, b, row), turn, eps)


def _multiply(query, w_key, q_out, h, column, width: int):
  (C, _, N), (T, _, W) = w_key.shape, q_out.shape
  zero = h * 0  # hides indices, see `_sum`
  inside_C, (all_N, inside_N) = column + jnp.arange(COLUMNS) < C, span(zero, N)
  mask = inside_C[:, None] & inside_N
  place = w_key.at[pl.ds(column, COLUMNS), h, all_N]
  tile = plt.load(place, mask=mask, other=0).astype(jnp.float32)
  for t in range(T):
    q = _sum(query, zero + t, h * width + jnp.arange(len(inside_N)), inside_N, q_out.dtype)
    product = (tile * q).sum(1).astype(q_out.dtype)
    plt.store(q_out.at[zero + t, h, pl.ds(column, COLUMNS)], product, mask=inside_C & (column < W))


def _turn_queries(query, q_out, t, C: int, N: int, turn):
  H, R = q_out.shape[1], q_out.shape[2] - C
  (heads, inside_H), (rotary, inside_R) = span(t * 0, H), span(t * 0 + C, R)
  head, r, mask = jnp.arange(len(inside_H))[:, None], jnp.arange(len(inside_R)), inside_H[:, None] & inside_R
  turned = turn(query, head * (N + R) + N, r, mask, q_out.dtype)
  plt.store(q_out.at[t, heads, rotary], turned, mask=mask)


def _write_row(down, scale, cache, where, turn, eps: float):
  (t, b, row), C, W = where, scale.shape[0], cache.shape[2]
  (latents, inside_C), (rotary, inside_R) = span(t * 0, C), span(t * 0 + C, W - C)
  start = down.shape[2] - W
  latent = _sum(down, t, start + jnp.arange(len(inside_C)), inside_C, cache.dtype)
  scales = plt.load(scale.at[latents], mask=inside_C, other=0).astype(jnp.float32)
  normed = latent * inverse_rms((latent * latent).sum(), C, eps) * scales
  turned = turn(down, start + C, jnp.arange(len(inside_R)), inside_R, cache.dtype)
  there = row < cache.shape[1]
  plt.store(cache.at[b, row, latents], normed.astype(cache.dtype), mask=there & inside_C)
  plt.store(cache.at[b, row, rotary], turned, mask=there & inside_R)


def _turned(parts, start, r, mask, dtype, *, t, cos, sin):
  """Components r from `start`, each pair turned by its angle (`moe.model.rope.turn`)."""
  own, other = (_sum(parts, t, start + at, mask, dtype) for at in (r, r ^ 1))
  c, s = (plt.load(table.at[t, r // 2], mask=r // 2 < table.shape[1], other=0) for table in (cos, sin))
  return (own * c + jnp.where(r % 2 == 0, -other, other) * s).astype(dtype)


def _sum(parts, t, columns, mask, dtype):
  """float32 of the parts' sum, rounded to dtype. t is no constant: the interpreter of jax 0.10 takes none."""
  loads = [plt.load(parts.at[t * 0 + p, t, columns], mask=mask, other=0) for p in range(parts.shape[0])]
  total = sum(load.astype(jnp.float32) for load in loads)
  return lax.convert_element_type(total, dtype).astype(jnp.float32)
