"""Attention over MLA's cache, whose rows are key and value at once: [latent (C), rotary key (R)] for all heads.

On GPUs in bfloat16 a Pallas kernel, compiled by Triton: it reads each block of the cache once for 16 rows of queries,
up to the last position that one of them sees, with a running maximum and sum. A long cache is cut into parts that run
side by side, as few sequences would leave most of the GPU idle. For few tokens another kernel puts the parts together
as it multiplies with the values' up-projection. Elsewhere in jnp. Nothing has a gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.decode.latent_inputs_gpu import FEW_TOKENS
from moe.ops.masking import MASKED, masked_softmax
from moe.ops.triton_call import call, span
from moe.ops.varying import align

ROWS, BLOCK = 16, 64  # rows of queries and positions of the cache that a program has at a time
PROGRAMS = 64  # with fewer, the cache is cut into parts: too few would not keep the memory busy
COLUMNS, PARTS = 16, 16  # of values, and parts of the cache, that a program has at a time as it puts parts together
WARPS, STAGES = 4, 2
LOG2_E = math.log2(math.e)


def attend(q_BSHW, cache_BTW, position_BS, w_value_CHU, scale: float) -> jax.Array:
  """softmax(scale * q cache^T) cache[..., :C] w_value, head by head: [B, S, H, U].

  Args:
    q_BSHW: queries, W = C + R wide as the cache.
    cache_BTW: T positions of the same dtype.
    position_BS: int32, at least 0: last position of the cache that each query sees; past the end, it sees all.
    w_value_CHU: the values' up-projection.
    scale: factor on the scores.
  """
  operands = align(q_BSHW, cache_BTW, position_BS, w_value_CHU)
  plain = functools.partial(_plain, scale=scale)
  if q_BSHW.dtype != jnp.bfloat16:
    return plain(*operands)
  return lax.platform_dependent(*operands, cuda=functools.partial(_on_gpu, scale=scale), default=plain)


def _plain(q_BSHW, cache_BTW, position_BS, w_value_CHU, scale: float):
  B, S, H, W = q_BSHW.shape
  # Queries of all heads as the rows of one product per sequence: XLA:CPU takes a third of the time that way.
  q_BMW, position_BM = q_BSHW.reshape(B, S * H, W), jnp.repeat(position_BS, H, axis=1)
  scores_BMT = jnp.einsum('bmw,btw->bmt', q_BMW, cache_BTW, preferred_element_type=jnp.float32) * scale
  seen_BMT = jnp.arange(cache_BTW.shape[1]) <= position_BM[..., None]
  probs_BMT = masked_softmax(scores_BMT, seen_BMT).astype(cache_BTW.dtype)
  # Over the whole width, since a slice of the cache would be a copy of it.
  out_BSHW = jnp.einsum('bmt,btw->bmw', probs_BMT, cache_BTW).reshape(B, S, H, W)
  return _values(out_BSHW[..., : len(w_value_CHU)], w_value_CHU)


def _values(out_BSHC, w_value_CHU):
  return jnp.einsum('bshc,chu->bshu', out_BSHC, w_value_CHU)


def _on_gpu(q_BSHW, cache_BTW, position_BS, w_value_CHU, scale: float, interpret: bool = False):
  out_PBMC, lse_PBM = _attend_on_gpu(q_BSHW, cache_BTW, position_BS, scale, len(w_value_CHU), interpret)
  B, S, H, _ = q_BSHW.shape
  if B * S <= FEW_TOKENS:
    return _values_on_gpu(out_PBMC, lse_PBM, w_value_CHU, (B, S, H), q_BSHW.dtype, interpret)
  if len(out_PBMC) > 1:
    share_PBM = jnp.exp2(lse_PBM - lse_PBM.max(0))
    out_PBMC = (out_PBMC * (share_PBM / share_PBM.sum(0))[..., None]).sum(0, keepdims=True).astype(q_BSHW.dtype)
  return _values(out_PBMC.reshape(B, S, H, -1), w_value_CHU)


def _attend_on_gpu(q_BSHW, cache_BTW, position_BS, scale: float, width: int, interpret: bool):
  """Of each part of the cache that is attended to on its own, the result and log2 of the sum of its weights."""
  (B, S, H, W), T = q_BSHW.shape, cache_BTW.shape[1]
  rows = pl.cdiv(S * H, ROWS)
  block = BLOCK if rows * B * pl.cdiv(T, BLOCK) > PROGRAMS else BLOCK // 2
  part = pl.cdiv(pl.cdiv(T, block), pl.cdiv(PROGRAMS, rows * B)) * block
  parts = pl.cdiv(T, part)
  position_BM = jnp.repeat(position_BS, H, axis=1)
  kernel = functools.partial(_kernel, scale=scale * LOG2_E, width=width, part=part, block=block)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  outs = [
    ((parts, B, S * H, width), jnp.float32 if parts > 1 else q_BSHW.dtype, anywhere),
    ((parts, B, S * H), jnp.float32, anywhere),
  ]
  operands = q_BSHW.reshape(B, S * H, W), cache_BTW, position_BM
  return call(kernel, (rows, B, parts), operands, [anywhere] * 3, outs, WARPS, STAGES, interpret)


def _kernel(q, cache, position, out, lse, scale: float, width: int, part: int, block: int):
  b, p, first = pl.program_id(1), pl.program_id(2), pl.program_id(0) * ROWS
  (M, W), T = q.shape[1:], cache.shape[1]
  mine = first + jnp.arange(ROWS) < M
  rows = pl.ds(first, ROWS)
  pieces = [span(p * 0, width, least=16), span(p * 0 + width, W - width, least=16)]
  load = lambda ref, i, at, there, piece: plt.load(ref.at[i, at, piece[0]], mask=there[:, None] & piece[1], other=0)
  queries = [load(q, b, rows, mine, piece) for piece in pieces]
  last = jnp.minimum(plt.load(position.at[b, rows], mask=mine, other=0), T - 1)

  def step(j, carry):
    top, total, sums = carry
    at = p * part + j * block
    columns = at + jnp.arange(block)
    keys = [load(cache, b, pl.ds(at, block), columns < T, piece) for piece in pieces]
    scores = sum(plt.dot(query, key.T) for query, key in zip(queries, keys, strict=True)) * scale
    scores = jnp.where(columns <= last[:, None], scores, MASKED)
    new_top = jnp.maximum(top, scores.max(1))
    probs, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
    probs = jnp.where(columns <= last[:, None], probs, 0)  # of a part in which a row sees nothing
    sums = sums * shrink[:, None] + plt.dot(probs.astype(keys[0].dtype), keys[0])
    return new_top, total * shrink + probs.sum(1), sums

  blocks = jnp.clip(pl.cdiv(last.max() + 1 - p * part, block), 0, part // block)
  latent, inside = pieces[0]
  nothing = jnp.full((ROWS,), MASKED), jnp.zeros((ROWS,)), jnp.zeros((ROWS, latent.size))
  top, total, sums = lax.fori_loop(0, blocks, step, nothing)
  total_or_1 = jnp.where(total > 0, total, 1)
  result = (sums / total_or_1[:, None]).astype(out.dtype)
  plt.store(out.at[p, b, rows, latent], result, mask=mine[:, None] & inside)
  plt.store(lse.at[p, b, rows], jnp.where(total > 0, top + jnp.log2(total_or_1), MASKED), mask=mine)


def _values_on_gpu(out_PBMC, lse_PBM, w_value_CHU, shape, dtype, interpret: bool):
  """The parts put together, times the values' up-projection: [B, S, H, U]. shape: B, S, H."""
  H, U = w_value_CHU.shape[1:]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  outs = [((*shape, U), dtype, anywhere)]
  operands, grid = (out_PBMC, lse_PBM, w_value_CHU), (H, pl.cdiv(U, COLUMNS))
  return call(_values_kernel, grid, operands, [anywhere] * 3, outs, WARPS, 1, interpret)[0]


def _values_kernel(parts, lse, w_value, out):
  """Some columns of a head's values, for all tokens."""
  (P, B, M, C), h, column = parts.shape, pl.program_id(0), pl.program_id(1) * COLUMNS
  S, (latent, inside_C), inside_U = out.shape[1], span(h * 0, C), column + jnp.arange(COLUMNS) < out.shape[3]
  mask = inside_C[:, None] & inside_U
  w_CU = plt.load(w_value.at[latent, h, pl.ds(column, COLUMNS)], mask=mask, other=0).astype(jnp.float32)
  many = min(PARTS, pl.next_power_of_2(P))
  for t in range(B * S):
    b, m = h * 0 + t // S, t % S * (M // S) + h

    def load(ref, p, *rest, fill):
      there = p + jnp.arange(many) < P
      mask = there[:, None] & inside_C if rest else there
      return plt.load(ref.at[pl.ds(h * 0 + p, many), b, m, *rest], mask=mask, other=fill)  # noqa: B023

    starts = range(0, P, many)
    logs = [load(lse, p, fill=MASKED) for p in starts]
    results = [load(parts, p, latent, fill=0).astype(jnp.float32) for p in starts]
    top = functools.reduce(jnp.maximum, [log.max() for log in logs])
    shares = [jnp.exp2(log - top) for log in logs]
    result = sum((share[:, None] * found).sum(0) for share, found in zip(shares, results, strict=True))
    result = (result / sum(share.sum() for share in shares)).astype(out.dtype).astype(jnp.float32)
    value = (result[:, None] * w_CU).sum(0).astype(out.dtype)
    plt.store(out.at[b, h * 0 + t % S, h, pl.ds(column, COLUMNS)], value, mask=inside_U)
