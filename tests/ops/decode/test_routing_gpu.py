"""The kernel that routes few tokens, interpreted and lowered, against `route_logits`, which has tests of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import lower_for_gpu

from moe.config import ModelConfig
from moe.model.router import choose, route_logits
from moe.ops.decode import routing_gpu

BASE = ModelConfig(num_experts=12, top_k=3, route_scale=2.5)
MODELS = {
  'sigmoid': BASE,
  'softmax_raw': dataclasses.replace(BASE, score_fn='softmax', normalize_gates=False),
  'groups': dataclasses.replace(BASE, num_groups=4, top_groups=2, top_k=5),
  'softmax_groups': dataclasses.replace(BASE, score_fn='softmax', num_groups=3, top_groups=1, top_k=4),
  'all_of_all': dataclasses.replace(BASE, num_experts=5, top_k=5),
  'one_of_one': dataclasses.replace(BASE, num_experts=1, top_k=1),
}


def inputs(model, ties, parts=3, tokens=40):
  """Logits as parts of sums, a bias of both signs, a mask. With `ties`, of few values, so that experts are equal."""
  rng = np.random.default_rng(0)
  shape = parts, tokens, model.num_experts
  logits_PTE = rng.integers(-1, 2, shape) if ties else rng.normal(size=shape)
  bias_E = rng.integers(-1, 2, model.num_experts) / 4 if ties else rng.normal(size=model.num_experts)
  return jnp.asarray(logits_PTE, jnp.float32), jnp.asarray(bias_E, jnp.float32), jnp.asarray(rng.random(tokens) < 0.8)


@pytest.mark.parametrize('multiplicative', [False, True])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('model', MODELS)
def test_choices_equal_route_logits(model, ties, multiplicative):
  model = MODELS[model]
  logits_PTE, bias_E, mask_T = inputs(model, ties)
  want = route_logits(logits_PTE.sum(0), bias_E, mask_T, model, multiplicative, dropless=True)
  for shared in (False, True):
    kernel = functools.partial(routing_gpu.choose, interpret=True)
    for run in (kernel, choose):
      run = jax.jit(functools.partial(run, config=model, multiplicative=multiplicative, shared=shared))
      expert_TK, weight_TK = run(logits_PTE, bias_E, mask_T)
      assert (expert_TK.dtype, weight_TK.dtype) == (jnp.int32, jnp.float32)
      assert expert_TK.shape == weight_TK.shape == (len(mask_T), model.top_k + shared)
      np.testing.assert_array_equal(expert_TK[mask_T][:, : model.top_k], want.expert_TK[mask_T])
      np.testing.assert_array_equal(expert_TK[~mask_T], model.num_experts + shared)
      np.testing.assert_allclose(weight_TK[:, : model.top_k], want.weight_TK, rtol=1e-6)
      if shared:
        np.testing.assert_array_equal(expert_TK[mask_T][:, -1], model.num_experts)
        np.testing.assert_array_equal(weight_TK[:, -1], 1)


def test_no_number_is_an_expert_that_there_is():
  """Logits that are not numbers choose some expert, not memory past the last."""
  logits_PTE, bias_E, mask_T = inputs(BASE, ties=False)
  run = functools.partial(routing_gpu.choose, config=BASE, multiplicative=False, shared=False, interpret=True)
  expert_TK, _ = run(jnp.full_like(logits_PTE, jnp.nan), bias_E, jnp.ones_like(mask_T))
  assert ((expert_TK >= 0) & (expert_TK < BASE.num_experts)).all()


@pytest.mark.parametrize('model', MODELS)
def test_is_one_kernel_on_gpus(model):
  operands = inputs(MODELS[model], ties=False)
  run = jax.jit(functools.partial(choose, config=MODELS[model], shared=True))
  text = lower_for_gpu(run, *operands).as_text()
  assert text.count('xla.gpu.triton') == 1
  assert 'sort' not in text
