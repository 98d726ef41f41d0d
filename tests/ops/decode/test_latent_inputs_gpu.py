"""Absorbed queries and rows of the cache: the kernel, interpreted and lowered, against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu

from moe.ops.decode import latent_inputs_gpu
from moe.ops.decode.latent_inputs_gpu import Inputs

EPS = 1e-6
# Sequences B, tokens S, heads H, latent C, what does not turn N, what does R, parts of the sums, capacity.
CASES = {
  'one_token': (1, 1, 4, 128, 32, 16, 3, 20),
  'some': (3, 2, 2, 64, 16, 8, 1, 9),
  'odd_widths': (2, 1, 3, 72, 24, 6, 5, 10),
}


def inputs(case, dtype, in_one=True):
  """`in_one`: queries, latents and rotary keys are one product's columns."""
  B, S, H, C, N, R, P, capacity = CASES[case]
  rng = np.random.default_rng(0)
  normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)
  Q, partial = H * (N + R), jnp.float32 if P > 1 else dtype
  down_PTF = normal(P, B * S, Q + C + R, dtype=partial)
  query_PTQ = down_PTF if in_one else normal(P + 1, B * S, Q, dtype=jnp.float32)
  angle_BSR = rng.uniform(0, 7, (B, S, R // 2))
  cos_BSR, sin_BSR = (jnp.asarray(f(angle_BSR), jnp.float32) for f in (np.cos, np.sin))
  position_BS = rng.permutation(capacity)[:S] + np.zeros((B, 1), int)
  position_BS[-1, -1] = capacity if B > 1 else capacity - 1  # the former is not written
  w_key_CHN, scale_C, cache = normal(C, H, N), normal(C, dtype=jnp.float32), normal(B, capacity, C + R)
  position_BS = jnp.asarray(position_BS, jnp.int32)
  return Inputs(query_PTQ, down_PTF, w_key_CHN, scale_C, cos_BSR, sin_BSR, position_BS, cache)


def exact(given: Inputs, dtype):
  """Token by token, from sums rounded to dtype, with turns as products of complex numbers."""
  rounded = lambda parts: np.asarray(jnp.asarray(np.asarray(parts, np.float64).sum(0), dtype), np.float64)
  (C, H, N), (B, S) = given.w_key_CHN.shape, given.position_BS.shape
  query_TQ, down_TF, cache = rounded(given.query_PTQ), rounded(given.down_PTF), np.array(given.cache_BTW, np.float64)
  R = cache.shape[2] - C
  q_BSHW = np.empty((B, S, H, C + R))
  for b, s in np.ndindex(B, S):
    angle = np.asarray(given.cos_BSR[b, s], np.float64) + 1j * np.asarray(given.sin_BSR[b, s], np.float64)
    turn = lambda x, angle=angle: ((x[..., ::2] + 1j * x[..., 1::2]) * angle).view(np.float64)
    heads = query_TQ[b * S + s][: H * (N + R)].reshape(H, N + R)
    q_BSHW[b, s, :, :C] = np.einsum('hn,chn->hc', heads[:, :N], np.asarray(given.w_key_CHN, np.float64))
    q_BSHW[b, s, :, C:] = turn(heads[:, N:])
    latent, key = np.split(down_TF[b * S + s][-C - R :], [C])
    if given.position_BS[b, s] < cache.shape[1]:
      latent = latent / np.sqrt((latent**2).mean() + EPS) * np.asarray(given.scale_C)
      cache[b, given.position_BS[b, s]] = np.concatenate([latent, turn(key)])
  return q_BSHW, cache


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('case', CASES)
def test_the_kernel_interpreted(case, dtype):
  given = inputs(case, dtype, in_one=case != 'odd_widths')
  run = jax.jit(functools.partial(latent_inputs_gpu.absorb, eps=EPS, interpret=True))
  tolerance = 2e-6 if dtype == jnp.float32 else 2.0**-7
  for got, want in zip(run(given), exact(given, dtype), strict=True):
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize('case', CASES)
def test_is_one_kernel_on_gpus_that_writes_in_place(case):
  run = jax.jit(functools.partial(latent_inputs_gpu.absorb, eps=EPS))
  text = lower_for_gpu(run, inputs(case, jnp.bfloat16)).as_text()
  assert text.count('xla.gpu.triton') == 1
  assert 'output_operand_alias' in text
