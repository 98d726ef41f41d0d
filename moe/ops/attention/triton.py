"""Attention for GPUs: three Pallas kernels compiled by Triton (FlashAttention-2, arXiv 2307.08691).

    forward   per block of queries: over the blocks of keys that one of them sees, with a running maximum and sum
    dq        the same walk, with the softmax sums known
    dkv       per block of keys: over the blocks of queries that see one of them

Only blocks at an edge, of a document or of the future, are masked.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.masking import MASKED
from moe.ops.triton_call import call

LOG2_E = math.log2(math.e)
ROWS = 128  # sequences are padded to a multiple
# Queries and keys of a tile, warps, and stages of the loop's software pipeline.
FORWARD, DQ, DKV = (128, 64, 8, 3), (128, 64, 8, 3), (32, 64, 4, 3)


def forward(queries, keys, v_BSHU, start_BS, scale: float, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(out [B, S, H, U], float32 natural logarithm of the softmax sums [B, H, S]); see `moe.ops.attention.attend`.

  Args:
    queries, keys, v_BSHU, start_BS, scale: as of `blocked.forward`; bfloat16.
    interpret: run by jnp instead, on any platform.
  """
  shape = v_BSHU.shape
  queries, keys, v_BSHU, start_BS, _ = _padded(queries, keys, v_BSHU, start_BS, start_BS)
  B, S, H, U = v_BSHU.shape
  block_q, block_k, warps, stages = FORWARD
  kernel = functools.partial(_forward_kernel, parts=len(queries), scale=scale * LOG2_E, block_k=block_k)
  tile, whole = functools.partial(_spec, block_q), functools.partial(_spec, S)
  out_BSHU, lse_BHS = call(
    kernel,
    (S // block_q, H, B),
    (*queries, *keys, v_BSHU, start_BS),
    [*map(tile, queries), *map(whole, keys), whole(v_BSHU), _position_spec(block_q)],
    [((B, S, H, U), v_BSHU.dtype, tile(v_BSHU)), ((B, H, S), jnp.float32, _row_spec(block_q))],
    warps,
    stages,
    interpret,
  )
  return out_BSHU[:, : shape[1], :, : shape[3]], lse_BHS[:, :, : shape[1]] / LOG2_E


def backward(
  queries, keys, v_BSHU, start_BS, end_BS, dout_BSHU, lse_BHS, delta_BHS, scale: float, interpret: bool = False
):
  """Gradients of the queries' parts, the keys' parts (a row per head) and the values; see `blocked.backward`.

  Args:
    queries, keys, v_BSHU, start_BS, end_BS, dout_BSHU, lse_BHS, delta_BHS, scale: as of `blocked.backward`.
    interpret: run by jnp instead, on any platform.
  """
  shapes = [a.shape for a in (*queries, *queries, v_BSHU)]
  (dout_BSHU,), S = _heads_padded((dout_BSHU,)), v_BSHU.shape[1]
  queries, keys, v_BSHU, start_BS, end_BS = _padded(queries, keys, v_BSHU, start_BS, end_BS)
  more = v_BSHU.shape[1] - S
  dout_BSHU = jnp.pad(dout_BSHU, ((0, 0), (0, more), (0, 0), (0, 0)))
  lse_BHS, delta_BHS = (jnp.pad(a, ((0, 0), (0, 0), (0, more))) for a in (lse_BHS * LOG2_E, delta_BHS))
  operands = (*queries, *keys, v_BSHU, dout_BSHU, lse_BHS, delta_BHS)
  padded = (
    *_dq(queries, keys, v_BSHU, operands, start_BS, scale, interpret),
    *_dkv(queries, keys, v_BSHU, operands, end_BS, scale, interpret),
  )
  outs = [out[tuple(map(slice, shape))] for out, shape in zip(padded, shapes, strict=True)]
  n = len(queries)
  return tuple(outs[:n]), tuple(outs[n:-1]), outs[-1]


def _dq(queries, keys, v_BSHU, operands, start_BS, scale, interpret):
  B, S, H, _ = v_BSHU.shape
  block_q, block_k, warps, stages = DQ
  kernel = functools.partial(_dq_kernel, parts=len(queries), scale=scale, block_k=block_k)
  tile, whole, row = functools.partial(_spec, block_q), functools.partial(_spec, S), _row_spec(block_q)
  specs = [*map(tile, queries), *map(whole, keys), whole(v_BSHU), tile(v_BSHU), row, row, _position_spec(block_q)]
  outs = [(query.shape, query.dtype, tile(query)) for query in queries]
  return call(kernel, (S // block_q, H, B), (*operands, start_BS), specs, outs, warps, stages, interpret)


def _dkv(queries, keys, v_BSHU, operands, end_BS, scale, interpret):
  B, S, H, _ = v_BSHU.shape
  block_q, block_k, warps, stages = DKV
  kernel = functools.partial(_dkv_kernel, parts=len(queries), scale=scale, block_q=block_q)
  tile, whole, row = functools.partial(_spec, block_k), functools.partial(_spec, S), _row_spec(S, whole=True)
  specs = [*map(whole, queries), *map(tile, keys), tile(v_BSHU), whole(v_BSHU), row, row, _position_spec(block_k)]
  outs = [(a.shape, a.dtype, tile(a)) for a in (*queries, v_BSHU)]  # a key's gradient has a row per head
  return call(kernel, (S // block_k, H, B), (*operands, end_BS), specs, outs, warps, stages, interpret)


def _forward_kernel(*refs, parts: int, scale: float, block_k: int):
  whole_q, k, (v, start, out, lse) = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
  q = [part[...] for part in whole_q]
  block_q, start = len(q[0]), start[...]
  first = pl.program_id(0) * block_q

  def step(j, carry, masked):
    top, total, sums = carry
    columns = pl.ds(j * block_k, block_k)
    scores = _products(q, [plt.load(part.at[columns]) for part in k]) * scale
    if masked:
      position = first + jnp.arange(block_q)[:, None]
      scores = _mask(scores, j * block_k + jnp.arange(block_k), start[:, None], position + 1)
    new_top = jnp.maximum(top, scores.max(1))
    probs, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
    tile_v = plt.load(v.at[columns])
    sums = sums * shrink[:, None] + plt.dot(probs.astype(tile_v.dtype), tile_v)
    return new_top, total * shrink + probs.sum(1), sums

  nothing = jnp.full((block_q,), MASKED), jnp.zeros((block_q,)), jnp.zeros((block_q, v.shape[1]))
  top, total, sums = _over_keys(step, nothing, start, first, block_q, block_k)
  out[...] = (sums / total[:, None]).astype(out.dtype)
  lse[...] = top + jnp.log2(total)


def _dq_kernel(*refs, parts: int, scale: float, block_k: int):
  whole_q, k, refs = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
  v, dout, lse, delta, start, *dq = refs
  q = [part[...] for part in whole_q]
  dout, lse, delta, start = dout[...], lse[...][:, None], delta[...][:, None], start[...]
  block_q = len(q[0])
  first = pl.program_id(0) * block_q

  def step(j, carry, masked):
    columns = pl.ds(j * block_k, block_k)
    tile_k, tile_v = [plt.load(part.at[columns]) for part in k], plt.load(v.at[columns])
    scores = _products(q, tile_k) * (scale * LOG2_E)
    if masked:
      position = first + jnp.arange(block_q)[:, None]
      scores = _mask(scores, j * block_k + jnp.arange(block_k), start[:, None], position + 1)
    dscores = jnp.exp2(scores - lse) * (plt.dot(dout, tile_v.T) - delta)
    return tuple(total + plt.dot(dscores.astype(part.dtype), part) for total, part in zip(carry, tile_k, strict=True))

  nothing = tuple(jnp.zeros(part.shape) for part in q)
  sums = _over_keys(step, nothing, start, first, block_q, block_k)
  for part, total in zip(dq, sums, strict=True):
    part[...] = (total * scale).astype(part.dtype)


def _dkv_kernel(*refs, parts: int, scale: float, block_q: int):
  q, whole_k, refs = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
  v, dout, lse, delta, end, *dk, dv = refs
  k, v, end = [part[...] for part in whole_k], v[...], end[...]
  block_k = len(v)
  first = pl.program_id(0) * block_k
  position = first + jnp.arange(block_k)[:, None]

  def step(i, carry, masked):
    *sums, sum_v = carry
    rows = pl.ds(i * block_q, block_q)
    tile_q, tile_dout = [plt.load(part.at[rows]) for part in q], plt.load(dout.at[rows])
    scores = _products(k, tile_q) * (scale * LOG2_E)  # keys by queries
    if masked:
      scores = _mask(scores, i * block_q + jnp.arange(block_q), position, end[:, None])
    probs = jnp.exp2(scores - plt.load(lse.at[rows])[None])
    sum_v += plt.dot(probs.astype(v.dtype), tile_dout)
    dscores = probs * (plt.dot(v, tile_dout.T) - plt.load(delta.at[rows])[None])
    sums = [total + plt.dot(dscores.astype(part.dtype), part) for total, part in zip(sums, tile_q, strict=True)]
    return *sums, sum_v

  # Blocks of queries on the diagonal, those that see all of these keys, and those with documents' ends.
  stop = pl.cdiv(jnp.max(end), block_q)
  plain = pl.cdiv(first + block_k, block_q)
  edge = jnp.maximum(jnp.min(end) // block_q, plain)
  carry = *(jnp.zeros(part.shape) for part in k), jnp.zeros(v.shape)
  for lower, upper, masked in (
    (first // block_q, jnp.minimum(plain, stop), True),
    (plain, edge, False),
    (edge, stop, True),
  ):
    carry = lax.fori_loop(lower, upper, functools.partial(step, masked=masked), carry)
  for part, total in zip(dk, carry[:-1], strict=True):
    part[...] = (total * scale).astype(part.dtype)
  dv[...] = carry[-1].astype(dv.dtype)


def _over_keys(step, carry, start, first, block_q: int, block_k: int):
  """Blocks of keys with documents' starts, those that all of these queries see, and those on the diagonal."""
  stop = pl.cdiv(first + block_q, block_k)
  diagonal = first // block_k
  plain = jnp.minimum(pl.cdiv(jnp.max(start), block_k), diagonal)
  for lower, upper, masked in (
    (jnp.min(start) // block_k, plain, True),
    (plain, diagonal, False),
    (diagonal, stop, True),
  ):
    carry = lax.fori_loop(lower, upper, functools.partial(step, masked=masked), carry)
  return carry


def _products(left, right):
  """float32 [rows of left, rows of right], summed over the parts."""
  return sum(plt.dot(a, b.T) for a, b in zip(left, right, strict=True))


def _mask(scores, columns, first, end):
  return jnp.where((columns[None] >= first) & (columns[None] < end), scores, MASKED)


def _spec(rows, a_BSHd):
  """`rows` positions of one head: the grid's block of them, or all if the array has no more."""
  _, S, heads, width = a_BSHd.shape
  block = (lambda i: 0) if rows == S else (lambda i: i)
  head = (lambda h: 0) if heads == 1 else (lambda h: h)
  return pl.BlockSpec((None, rows, None, width), lambda i, h, b: (b, block(i), head(h), 0))


def _row_spec(rows, whole=False):
  return pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, 0 if whole else i))


def _position_spec(rows):
  return pl.BlockSpec((None, rows), lambda i, h, b: (b, i))


def _padded(queries, keys, v_BSHU, start_BS, end_BS):
  """Operands with heads of a power of two and whole tiles of positions; each of the new ones is a document."""
  S = v_BSHU.shape[1]
  more = -S % ROWS
  *operands, v_BSHU = (
    jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))) for a in _heads_padded((*queries, *keys, v_BSHU))
  )
  past = jnp.broadcast_to(jnp.arange(S, S + more, dtype=jnp.int32), (len(start_BS), more))
  start_BS, end_BS = jnp.concatenate([start_BS, past], 1), jnp.concatenate([end_BS, past + 1], 1)
  return tuple(operands[: len(queries)]), tuple(operands[len(queries) :]), v_BSHU, start_BS, end_BS


def _heads_padded(arrays):
  pad = lambda a: jnp.pad(a, ((0, 0),) * 3 + ((0, max(16, pl.next_power_of_2(a.shape[3])) - a.shape[3]),))
  return tuple(map(pad, arrays))
