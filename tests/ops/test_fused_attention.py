"""Attention without an S x S array against float64 softmax: in jnp, and the Triton kernels interpreted.

Shapes are no multiples of blocks; documents begin and end anywhere; keys are shared by the heads or not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from moe.ops import attention
from moe.ops.attention import attend, blocked, triton
from moe.parallel.mesh import abstract_mesh

SCALE = 0.3
# batch, positions, heads, widths of the parts, whether the last part's key is shared, width of the values
CASES = {
  'mla': (2, 150, 2, (32, 16), True, 32),
  'odd_widths': (1, 70, 3, (20, 6), True, 10),
  'one_part': (1, 300, 1, (16,), False, 16),
  'whole_tiles': (1, 256, 2, (16, 16), True, 16),
}
LENGTHS = {'one': [10**6], 'short': [3, 1, 40, 1, 25, 100], 'edges': [64, 64, 1, 127, 300]}


def inputs(case):
  B, S, H, widths, shared, U = CASES[case]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  queries = tuple(draw(B, S, H, width) for width in widths)
  heads = [H] * (len(widths) - 1) + [1 if shared else H]
  keys = tuple(draw(B, S, h, width) for h, width in zip(heads, widths, strict=True))
  return queries, keys, draw(B, S, H, U), draw(B, S, H, U)


def segments(case, lengths):
  """Document ids per row; each row starts elsewhere in the list of lengths."""
  B, S = CASES[case][:2]
  rows = []
  for b in range(B):
    ids = np.repeat(np.arange(100), np.resize(np.roll(lengths, b), 100))[:S]
    rows.append(ids)
  return np.array(rows)


def exact(queries, keys, v, segment, dout):
  """Output and gradients in float64, by the whole S x S softmax."""
  queries, keys, v, dout = jax.tree.map(lambda a: a.astype(np.float64), (queries, keys, v, dout))
  S, H = v.shape[1:3]
  visible = (segment[:, :, None] == segment[:, None, :]) & np.tril(np.ones((S, S), bool))
  spread = [np.broadcast_to(key, (*key.shape[:2], H, key.shape[3])) for key in keys]
  scores = SCALE * sum(np.einsum('bqhd,bkhd->bhqk', q, k) for q, k in zip(queries, spread, strict=True))
  scores = np.where(visible[:, None], scores, -np.inf)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  dprobs = np.einsum('bqhu,bkhu->bhqk', dout, v)
  dscores = SCALE * probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True))
  dkeys = [np.einsum('bhqk,bqhd->bkhd', dscores, q) for q in queries]
  return (
    np.einsum('bhqk,bkhu->bqhu', probs, v),
    [np.einsum('bhqk,bkhd->bqhd', dscores, k) for k in spread],
    [dkey if key.shape[2] == H else dkey.sum(2, keepdims=True) for dkey, key in zip(dkeys, keys, strict=True)],
    np.einsum('bhqk,bqhu->bkhu', probs, dout),
  )


def close(actual, expected, tolerance):
  for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max())


def with_gradients(queries, keys, v, segment, dout):
  out, pull = jax.vjp(lambda *operands: attend(*operands, segment, SCALE), queries, keys, v)
  return out, *pull(dout)


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('case', CASES)
def test_blocked_equals_softmax(case, lengths, monkeypatch):
  monkeypatch.setattr(blocked, 'BLOCK', 64)
  queries, keys, v, dout = inputs(case)
  segment = segments(case, LENGTHS[lengths])
  close(jax.jit(with_gradients)(queries, keys, v, segment, dout), exact(queries, keys, v, segment, dout), 2e-6)


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('case', CASES)
def test_interpreted_triton_equals_softmax(case, lengths, monkeypatch):
  """With tiles of the sizes used on GPUs, in float32: the kernels' arithmetic, masks and loop bounds."""
  interpreted = lambda f: functools.partial(f, interpret=True)
  monkeypatch.setattr(blocked, 'forward', interpreted(triton.forward))
  monkeypatch.setattr(blocked, 'backward', interpreted(triton.backward))
  queries, keys, v, dout = inputs(case)
  segment = segments(case, LENGTHS[lengths])
  close(jax.jit(with_gradients)(queries, keys, v, segment, dout), exact(queries, keys, v, segment, dout), 2e-6)


def test_extents():
  start_BS, end_BS = attention.extents(jnp.asarray([[7, 7, 7, 2, 2, 9], [0, 0, 0, 0, 0, 0]]))
  np.testing.assert_array_equal(start_BS, [[0, 0, 0, 3, 3, 5], [0] * 6])
  np.testing.assert_array_equal(end_BS, [[3, 3, 3, 5, 5, 6], [6] * 6])


@pytest.mark.parametrize('S', [1024, 4096])
def test_memory_grows_with_positions_not_with_their_square(S):
  """No array of the gradient's program has as many elements as a block of queries by all keys allows, times two."""
  shape = lambda heads, width: jax.ShapeDtypeStruct((1, S, heads, width), jnp.float32)
  queries, keys, v = (shape(2, 16), shape(2, 8)), (shape(2, 16), shape(1, 8)), shape(2, 16)
  segment = jax.ShapeDtypeStruct((1, S), jnp.int32)
  jaxpr = jax.make_jaxpr(with_gradients)(queries, keys, v, segment, v).jaxpr

  def largest(jaxpr):
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, 'size')]
    return max(sizes + [largest(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)])

  assert largest(jaxpr) <= 2 * blocked.BLOCK * S  # 2 heads


@pytest.mark.parametrize('case', ['mla', 'one_part'])
def test_kernels_are_lowered_for_cuda_inside_shard_map(case):
  """Three Triton kernels for bfloat16, no S x S product, and a shared key's gradient is summed over tensor."""
  B, S, H, widths, shared, U = CASES[case]
  H *= 2
  make = lambda heads, width: jax.ShapeDtypeStruct((B, S, heads, width), jnp.bfloat16)
  queries = tuple(make(H, width) for width in widths)
  keys = (*(make(H, width) for width in widths[:-1]), make(1 if shared else H, widths[-1]))
  heads, shape = P(None, None, 'tensor'), (1, 1, 1, 2)
  key_specs = (*(heads for _ in widths[:-1]), P() if shared else heads)
  specs = (tuple(heads for _ in widths), key_specs, heads)
  mapped = jax.shard_map(
    with_gradients, mesh=abstract_mesh(shape), in_specs=(*specs, P(), heads), out_specs=(heads, *specs)
  )
  arguments = (queries, keys, make(H, U), jax.ShapeDtypeStruct((B, S), jnp.int32), make(H, U))
  text = lower_for_gpu(jax.jit(mapped), *arguments, shape=shape).as_text()
  assert text.count('xla.gpu.triton') == 3
  assert f'{S}x{S}' not in text
  assert text.count('stablehlo.all_reduce') == (1 if shared else 0)
