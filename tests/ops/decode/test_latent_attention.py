"""Attention over MLA's cache against float64 softmax: in jnp, and the Triton kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu

from moe.ops.decode import latent_attention

SCALE, U = 0.3, 20
# Sequences B, queries S, heads H, latent C, rotary R, cache T; the programs that a cache is cut into parts for.
CASES = {
  'one_query': ((2, 1, 4, 32, 16, 100), 64),
  'one_part': ((2, 1, 4, 32, 16, 100), 1),
  'drafts_and_odd_widths': ((3, 3, 5, 24, 6, 70), 64),
  'more_rows_than_a_program_has': ((1, 5, 7, 16, 10, 210), 8),
  'whole_blocks': ((1, 2, 8, 64, 64, 128), 2),
}


def inputs(case, dtype):
  """Queries, a cache, positions (the first and the last of the cache among them, and one past its end), values."""
  B, S, H, C, R, T = CASES[case][0]
  rng = np.random.default_rng(0)
  q_BSHW = jnp.asarray(rng.normal(size=(B, S, H, C + R)), dtype)
  cache_BTW = jnp.asarray(rng.normal(size=(B, T, C + R)), dtype)
  position_BS = rng.integers(0, T, (B, S)).astype(np.int32)
  position_BS.ravel()[-1] = T - 1 if S == 1 else T + 2
  position_BS[0, 0] = 0
  w_value_CHU = jnp.asarray(rng.normal(size=(C, H, U)) / C**0.5, dtype)
  return q_BSHW, cache_BTW, position_BS, w_value_CHU


def exact(q_BSHW, cache_BTW, position_BS, w_value_CHU):
  """Query by query, in float64, over the positions it sees."""
  q_BSHW, cache_BTW, w_value_CHU = (np.asarray(a, np.float64) for a in (q_BSHW, cache_BTW, w_value_CHU))
  out = np.empty((*q_BSHW.shape[:3], U))
  for b, s in np.ndindex(*position_BS.shape):
    seen_TW = cache_BTW[b, : position_BS[b, s] + 1]
    weight_HT = np.exp(SCALE * q_BSHW[b, s] @ seen_TW.T)
    latent_HC = weight_HT / weight_HT.sum(1, keepdims=True) @ seen_TW[:, : len(w_value_CHU)]
    out[b, s] = np.einsum('hc,chu->hu', latent_HC, w_value_CHU)
  return out


def assert_near(got, expected, dtype):
  """Within float32 rounding; in bfloat16 within that of probabilities and result, 2^-8 each."""
  assert got.dtype == dtype
  tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-7
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('case', CASES)
def test_in_jnp(case, dtype):
  operands = inputs(case, dtype)
  assert_near(latent_attention.attend(*operands, SCALE), exact(*operands), dtype)


# With few tokens, values are a kernel's; of at most 2 parts at a time, so that there are several times.
@pytest.mark.parametrize('few', [0, 99])
@pytest.mark.parametrize(
  ('case', 'dtype'), [*((case, jnp.float32) for case in CASES), ('drafts_and_odd_widths', jnp.bfloat16)]
)
def test_the_kernels_interpreted(case, dtype, few, monkeypatch):
  for name, value in (('PROGRAMS', CASES[case][1]), ('FEW_TOKENS', few), ('PARTS', 2)):
    monkeypatch.setattr(latent_attention, name, value)
  operands = inputs(case, dtype)
  run = functools.partial(latent_attention._on_gpu, scale=SCALE, interpret=True)
  assert_near(jax.jit(run)(*operands), exact(*operands), dtype)


@pytest.mark.parametrize('few', [0, 99])
def test_what_lies_behind_a_query_is_not_seen(few, monkeypatch):
  """Neither within a block nor in a part of which a query sees nothing."""
  for name, value in (('PROGRAMS', 64), ('FEW_TOKENS', few)):
    monkeypatch.setattr(latent_attention, name, value)
  q_BSHW, cache_BTW, position_BS, w_value_CHU = inputs('one_query', jnp.float32)
  position_BS[:] = [[5], [70]]
  poisoned_BTW = cache_BTW.at[0, 6:].set(1e9).at[1, 71:].set(1e9)
  run = functools.partial(latent_attention._on_gpu, scale=SCALE, interpret=True)
  got, want = (jax.jit(run)(q_BSHW, cache, position_BS, w_value_CHU) for cache in (poisoned_BTW, cache_BTW))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('few', [0, 99])
@pytest.mark.parametrize('case', CASES)
def test_lowers_for_gpus_in_bfloat16_only(case, few, monkeypatch):
  monkeypatch.setattr(latent_attention, 'FEW_TOKENS', few)
  q_BSHW, cache_BTW, position_BS, w_value_CHU = inputs(case, jnp.bfloat16)
  for dtype, kernels in ((jnp.bfloat16, 2 if few else 1), (jnp.float32, 0)):
    operands = q_BSHW.astype(dtype), cache_BTW.astype(dtype), position_BS, w_value_CHU.astype(dtype)
    run = jax.jit(functools.partial(latent_attention.attend, scale=SCALE))
    assert lower_for_gpu(run, *operands).as_text().count('xla.gpu.triton') == kernels
