"""Attention over MLA's cache, whose rows are key and value at once: [latent (C), rotary key (R)] for all heads.

On GPUs in bfloat16 one Pallas kernel, compiled by Triton: it reads each block of the cache once for 16 rows of queries,
up to the last position that one of them sees, with a running maximum and sum. A long cache is cut into parts that run
side by side, as few sequences would leave most of the GPU idle. Elsewhere in jnp. Nothing has a gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.triton_call import call
from moe.ops.varying import align

ROWS, BLOCK = 16, 64  # rows of queries and positions of the cache that a program has at a time
PROGRAMS = 64  # with fewer, the cache is cut into parts: too few would not keep the memory busy
WARPS, STAGES = 4, 2
MASKED = -1e30
LOG2_E = math.log2(math.e)


def attend(q_BSHW: jax.Array, cache_BTW: jax.Array, position_BS: jax.Array, scale: float, width: int) -> jax.Array:
  """softmax(scale * q cache^T) cache[..., :width]: [B, S, H, width].

  Args:
    q_BSHW: queries, W = C + R wide as the cache.
    cache_BTW: T positions of the same dtype.
    position_BS: int32, at least 0: last position of the cache that each query sees; past the end, it sees all.
    scale: factor on the scores.
    width: C.
  """
  q_BSHW, cache_BTW, position_BS = align(q_BSHW, cache_BTW, position_BS)
  plain = functools.partial(_plain, scale=scale, width=width)
  if q_BSHW.dtype != jnp.bfloat16:
    return plain(q_BSHW, cache_BTW, position_BS)
  kernel = functools.partial(_on_gpu, scale=scale, width=width)
  return lax.platform_dependent(q_BSHW, cache_BTW, position_BS, cuda=kernel, default=plain)


def _plain(q_BSHW, cache_BTW, position_BS, scale: float, width: int):
  B, S, H, W = q_BSHW.shape
  # Queries of all heads as the rows of one product per sequence: XLA:CPU takes a third of the time that way.
  q_BMW, position_BM = q_BSHW.reshape(B, S * H, W), jnp.repeat(position_BS, H, axis=1)
  scores_BMT = jnp.einsum('bmw,btw->bmt', q_BMW, cache_BTW, preferred_element_type=jnp.float32) * scale
  seen_BMT = jnp.arange(cache_BTW.shape[1]) <= position_BM[..., None]
  probs_BMT = jax.nn.softmax(jnp.where(seen_BMT, scores_BMT, MASKED), axis=-1).astype(cache_BTW.dtype)
  # Over the whole width, since a slice of the cache would be a copy of it.
  return jnp.einsum('bmt,btw->bmw', probs_BMT, cache_BTW).reshape(B, S, H, W)[..., :width]


def _on_gpu(q_BSHW, cache_BTW, position_BS, scale: float, width: int, interpret: bool = False):
  (B, S, H, W), T = q_BSHW.shape, cache_BTW.shape[1]
  rows, blocks = pl.cdiv(S * H, ROWS), pl.cdiv(T, BLOCK)
  part = pl.cdiv(blocks, pl.cdiv(PROGRAMS, rows * B)) * BLOCK
  parts = pl.cdiv(T, part)
  position_BM = jnp.repeat(position_BS, H, axis=1)
  kernel = functools.partial(_kernel, scale=scale * LOG2_E, width=width, part=part)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  outs = [
    ((parts, B, S * H, width), jnp.float32 if parts > 1 else q_BSHW.dtype, anywhere),
    ((parts, B, S * H), jnp.float32, anywhere),
  ]
  operands = q_BSHW.reshape(B, S * H, W), cache_BTW, position_BM
  out_PBMC, lse_PBM = call(kernel, (rows, B, parts), operands, [anywhere] * 3, outs, WARPS, STAGES, interpret)
  if parts > 1:
    share_PBM = jnp.exp2(lse_PBM - lse_PBM.max(0))
    out_PBMC = (out_PBMC * (share_PBM / share_PBM.sum(0))[..., None]).sum(0, keepdims=True).astype(q_BSHW.dtype)
  return out_PBMC.reshape(B, S, H, width)


def _kernel(q, cache, position, out, lse, scale: float, width: int, part: int):
  b, p, first = pl.program_id(1), pl.program_id(2), pl.program_id(0) * ROWS
  (M, W), T = q.shape[1:], cache.shape[1]
  mine = first + jnp.arange(ROWS) < M
  rows = pl.ds(first, ROWS)
  # Two pieces, as tensors in Triton are powers of two wide.
  pieces = [_span(0, width), _span(width, W - width)]
  load = lambda ref, i, at, there, span: plt.load(ref.at[i, at, span[0]], mask=there[:, None] & span[1], other=0)
  queries = [load(q, b, rows, mine, span) for span in pieces]
  last = jnp.minimum(plt.load(position.at[b, rows], mask=mine, other=0), T - 1)

  def step(j, carry):
    top, total, sums = carry
    at = p * part + j * BLOCK
    columns = at + jnp.arange(BLOCK)
    keys = [load(cache, b, pl.ds(at, BLOCK), columns < T, span) for span in pieces]
    scores = sum(plt.dot(query, key.T) for query, key in zip(queries, keys, strict=True)) * scale
    scores = jnp.where(columns <= last[:, None], scores, MASKED)
    new_top = jnp.maximum(top, scores.max(1))
    probs, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
    probs = jnp.where(columns <= last[:, None], probs, 0)  # of a part in which a row sees nothing
    sums = sums * shrink[:, None] + plt.dot(probs.astype(keys[0].dtype), keys[0])
    return new_top, total * shrink + probs.sum(1), sums

  blocks = jnp.clip(pl.cdiv(last.max() + 1 - p * part, BLOCK), 0, pl.cdiv(part, BLOCK))
  latent, inside = pieces[0]
  nothing = jnp.full((ROWS,), MASKED), jnp.zeros((ROWS,)), jnp.zeros((ROWS, latent.size))
  top, total, sums = lax.fori_loop(0, blocks, step, nothing)
  total_or_1 = jnp.where(total > 0, total, 1)
  result = (sums / total_or_1[:, None]).astype(out.dtype)
  plt.store(out.at[p, b, rows, latent], result, mask=mine[:, None] & inside)
  plt.store(lse.at[p, b, rows], jnp.where(total > 0, top + jnp.log2(total_or_1), MASKED), mask=mine)


def _span(start: int, size: int):
  """(`size` columns from `start` and what is missing to a power of two, 16 at least; which of them are not that)."""
  wide = max(16, pl.next_power_of_2(size))  # tensor cores take no less
  if wide > size:  # a slice known to reach past the end is refused, so its start is hidden
    start += pl.program_id(0) * 0
  return pl.ds(start, wide), jnp.arange(wide) < size
