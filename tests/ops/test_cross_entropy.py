"""The chunked cross-entropy against float64: values and gradients, over chunks, padding and a sharded vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe.ops import cross_entropy as module
from moe.ops.cross_entropy import cross_entropy

T, D, V, VOCAB = 300, 12, 256, 200


def exact(h, w, target, weight):
  """Summed nats and the gradients of h and w, in float64."""
  h, w = h.astype(np.float64), w.astype(np.float64)
  logits = (h @ w)[:, :VOCAB]
  probs = np.exp(logits - logits.max(1, keepdims=True))
  probs /= probs.sum(1, keepdims=True)
  dlogits = np.zeros((T, V))
  dlogits[:, :VOCAB] = (probs - np.eye(VOCAB)[target]) * weight[:, None]
  return -(np.log(probs[np.arange(T), target]) * weight).sum(), dlogits @ w.T, h.T @ dlogits


def inputs():
  rng = np.random.default_rng(0)
  h, w = rng.normal(size=(T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
  w[:, VOCAB:] *= 50  # padding that was not masked would win everywhere
  target = rng.integers(0, VOCAB, T)
  target[:4] = [0, 127, 128, VOCAB - 1]
  return h, w, target.astype(np.int32), rng.choice([0, 0, 1, 0.5], T).astype(np.float32)


@pytest.mark.parametrize('chunk', [128, 256, 1024])
@pytest.mark.parametrize('shape', [{}, {'tensor': 2}, {'data': 2, 'tensor': 2}], ids=str)
def test_equals_float64(shape, chunk, mesh_of, monkeypatch):
  monkeypatch.setattr(module, 'CHUNK_LOGITS', chunk * V // shape.get('tensor', 1))
  h, w, target, weight = inputs()
  rows = P('data')
  summed = lambda *operands: jax.lax.psum(cross_entropy(*operands, VOCAB), 'data')
  specs = rows, P(None, 'tensor'), rows, rows
  mapped = jax.jit(jax.shard_map(summed, mesh=mesh_of(**shape), in_specs=specs, out_specs=P()))
  run = jax.jit(jax.value_and_grad(lambda h, w: 3 * mapped(h, w, target, weight), argnums=(0, 1)))
  nats, (dh, dw) = run(h, w)
  expected, expected_dh, expected_dw = exact(h, w, target, weight)
  np.testing.assert_allclose(nats, 3 * expected, rtol=1e-5)
  np.testing.assert_allclose(mapped(h, w, target, weight), expected, rtol=1e-5)  # not differentiated: another program
  np.testing.assert_allclose(dh, 3 * expected_dh, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dw, 3 * expected_dw, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(dw[:, VOCAB:], 0)


@pytest.mark.parametrize('shape', [{}, {'data': 2, 'tensor': 2}], ids=str)
def test_that_of_each_token(shape, mesh_of, monkeypatch):
  monkeypatch.setattr(module, 'CHUNK_LOGITS', 128 * V // shape.get('tensor', 1))
  h, w, target, weight = inputs()
  rows, mesh = P('data'), mesh_of(**shape)
  specs = {'mesh': mesh, 'in_specs': (rows, P(None, 'tensor'), rows, rows)}
  each = jax.jit(jax.shard_map(lambda *a: module.cross_entropy_of_each(*a, VOCAB)[1], **specs, out_specs=rows))
  nats_T = np.asarray(each(h, w, target, weight))
  np.testing.assert_allclose(nats_T, [exact(h, w, target, one_T)[0] for one_T in np.eye(T)], rtol=1e-5)


def test_bfloat16_keeps_dtypes_and_float32_sums(mesh_of):
  h, w, target, weight = inputs()
  h, w = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
  mapped = jax.shard_map(
    lambda h, w: cross_entropy(h, w, target, weight, VOCAB), mesh=mesh_of(), in_specs=(P(), P()), out_specs=P()
  )
  nats, (dh, dw) = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1)))(h, w)
  expected, expected_dh, expected_dw = exact(np.asarray(h, np.float32), np.asarray(w, np.float32), target, weight)
  assert (nats.dtype, dh.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
  np.testing.assert_allclose(nats, expected, rtol=1e-5)
  for got, want in ((dh, expected_dh), (dw, expected_dw)):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_no_array_holds_all_tokens_by_all_words(mesh_of, monkeypatch):
  monkeypatch.setattr(module, 'CHUNK_LOGITS', 128 * V)
  h, w, target, weight = inputs()
  mapped = jax.shard_map(
    lambda h, w: cross_entropy(h, w, target, weight, VOCAB), mesh=mesh_of(), in_specs=(P(), P()), out_specs=P()
  )
  text = str(jax.make_jaxpr(jax.grad(mapped, argnums=(0, 1)))(h, w))
  assert f'{T},{V}' not in text
  assert f'128,{V}' in text
