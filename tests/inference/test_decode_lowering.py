"""A decoding step lowers for CUDA on meshes of GPUs that are not here: which kernels it calls, and what it copies."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from test_configs import load
from test_lowering import operations

from moe.inference import forward, generate, weights
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings, Slots
from moe.model import transformer
from moe.parallel import mesh
from moe.train import step

CAPACITY, LAYERS = 192, 2
EXPERTS, D, F = 64, 256, 128


def lower(scheme, shape, slots, drafts):
  """Decoding steps, in a loop, as a module for CUDA: a dense layer, one with experts, and an MTP module."""
  config = load('tiny', 'precision.compute=bfloat16')
  sizes = {'num_experts': EXPERTS, 'd_model': D, 'd_expert': F, 'd_ff': D, 'num_layers': LAYERS, 'top_k': 4}
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
  devices = mesh.abstract_mesh(shape)
  config = step.resolve(config, devices, 'hopper')
  bias_LE = jax.ShapeDtypeStruct((config.model.num_routers, EXPERTS), jnp.float32)
  prepare = lambda params, bias_LE: weights.prepare(params, bias_LE, config, devices, scheme)
  ready = jax.eval_shape(prepare, transformer.abstract_params(config), bias_LE)
  made = generate.Generator(ready, Settings(config, Sampling(0.8), (0, 1), CAPACITY, drafts), devices, slots)
  one = lambda dtype, *rest: jax.ShapeDtypeStruct((made.slots, *rest), dtype)
  int_B = one(jnp.int32)
  hidden_BKD, next_BK = one(jnp.bfloat16, drafts + 1, D), one(jnp.int32, drafts + 1)
  cache = forward.cache_shapes(config, made.slots, CAPACITY, mtp=drafts > 0)
  state = Slots(int_B, int_B, one(bool), int_B, one(jnp.uint32), hidden_BKD, next_BK, int_B, cache)
  return made._decode.trace(ready, state).lower(lowering_platforms=('cuda',)).compiler_ir()


# Kernels that take the cache, experts, and neither. The dense layer has two products. Each layer has two norms,
# attention's projections in and out, and with few tokens that of values; one with experts has the router's product and
# the shared expert's two.
NAMES = 'cache', 'experts', ''
CASES = {
  # Queries and rows of the cache come from one more kernel, and the routing from one. The shared expert is an expert.
  'most_rows_have_an_expert_of_their_own': ('none', (1, 1, 1, 1), 2, 0, (2 * 2, 2, 2 + 5 * 2 + 2)),
  'sorted_by_expert': ('fp8', (1, 1, 1, 1), 32, 1, (3, 2 * (2 + 2), 2 + 4 * 3 + 1 * 2)),
  'sharded_heads': ('mxfp4', (1, 1, 4, 2), 8, 2, (4, 2 * 3, 2 + 5 * 4 + 3 * 3)),
  'sharded_experts': ('none', (1, 2, 4, 1), 32, 0, (2 * 2, 2, 2 + 5 * 2 + 3)),
}


@pytest.mark.parametrize('case', CASES)
def test_decoding_reads_experts_where_they_lie(case):
  """Products with weights and attention over the cache are kernels, and nothing makes an array as large as experts."""
  scheme, shape, slots, drafts, expected = CASES[case]
  module = lower(scheme, shape, slots, drafts)
  _, _, expert, tensor = shape
  held = EXPERTS // expert * D * F // tensor // (2 if scheme == 'mxfp4' else 1)
  large, kernels = collections.Counter(), collections.Counter()
  for operation in operations(module):
    if operation.name == 'stablehlo.custom_call':
      target = operation.attributes['call_target_name'].value
      takes = {'cache' if CAPACITY in operand.type.shape else '' for operand in operation.operands}
      takes |= {'experts' for operand in operation.operands if math.prod(operand.type.shape) >= held}
      kernels[target, max(takes)] += 1
    large.update(operation.name for result in operation.results if size_of(result) >= held)
  assert kernels == {('__gpu$xla.gpu.triton', name): n for name, n in zip(NAMES, expected, strict=True)}
  assert set(large) == {'stablehlo.while'}  # which carries them


def size_of(result):
  """Numbers in a tensor; 0 for what is none."""
  return math.prod(getattr(result.type, 'shape', [0]))
