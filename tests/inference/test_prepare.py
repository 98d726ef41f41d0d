"""Which weights generation holds together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_configs import load

from moe.inference import quantize, weights
from moe.model import transformer
from moe.ops.weights import dequantize, shape_of


@pytest.mark.parametrize(
  ('scheme', 'shared', 'expert', 'joined'),
  [
    ('none', 1, 1, True),
    ('fp8', 1, 1, True),
    ('mxfp4', 1, 1, False),  # the shared one is in FP8
    ('none', 2, 1, False),  # twice as wide
    ('none', 1, 2, False),  # every shard would hold it
  ],
)
def test_a_shared_expert_like_the_others_is_one_of_them(scheme, shared, expert, joined, mesh_of):
  config = load('tiny', 'precision.compute=bfloat16')
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_shared_experts=shared, num_layers=2))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), transformer.abstract_params(config)
  )
  bias_LE = jnp.zeros((config.model.num_routers, config.model.num_experts))
  *_, layer = weights.prepare(params, bias_LE, config, mesh_of(expert=expert), scheme)['layers']
  assert ('shared' in layer) != joined
  for name, w in layer['experts'].items():
    assert shape_of(w)[0] == config.model.num_experts + joined
    if joined:
      of_shared = name.replace('_e', '_')
      own = {'shared': {of_shared: jnp.asarray(params['layers']['shared'][of_shared][-1], jnp.bfloat16)}}
      expected = quantize.rounded(own, scheme)['shared'][of_shared]
      np.testing.assert_array_equal(dequantize(w, jnp.bfloat16)[-1], expected)
