"""Where parameters live: by the letters of their names, and further over the batch axes while stored."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_configs import load

from moe.config import Config, PrecisionConfig
from moe.errors import UserError
from moe.model import transformer
from moe.parallel import sharding
from moe.parallel.mesh import abstract_mesh
from moe.train import zero

SIZES = {'pipe': 1, 'data': 2, 'expert': 4, 'tensor': 2}
BATCH = ('data', 'expert')


@pytest.mark.parametrize(
  ('name', 'ndim', 'axes'),
  [
    ('w_up_eDF', 3, 'eDF'),
    ('w_up_eDF', 4, 'LeDF'),
    ('scale_D', 1, 'D'),
    ('scale_D', 2, 'LD'),
    ('bias_LE', 2, 'LE'),
    ('w_query_rope_AHR', 4, 'LAHR'),
  ],
)
def test_axes_of_a_name(name, ndim, axes):
  assert sharding.axes_of(name, ndim) == axes


@pytest.mark.parametrize(
  ('name', 'ndim', 'named'),
  [
    ('w_up_eDX', 3, "'X'"),
    ('w_up', 2, "'p', 'u'"),
    ('w_up_eDF', 2, '2 axes'),
    ('w_up_eDF', 5, '5 axes'),
    ('scale_D', 0, '0 axes'),
  ],
)
def test_a_suffix_that_is_wrong_is_refused(name, ndim, named):
  with pytest.raises(ValueError, match=named) as error:
    sharding.axes_of(name, ndim)
  assert name in str(error.value)


@pytest.mark.parametrize(
  ('name', 'shape', 'compute', 'stored'),
  [
    # Expert parameters are stored over data alone: their expert axis is taken already.
    ('w_up_eDF', (8, 16, 32), ('expert', None, 'tensor'), ('expert', 'data', 'tensor')),
    ('w_down_eFD', (8, 32, 16), ('expert', 'tensor', None), ('expert', 'tensor', 'data')),
    ('w_up_eDF', (8, 15, 32), ('expert', None, 'tensor'), ('expert', None, 'tensor')),
    # All others over data and expert together, on the first free axis that 2 * 4 divides.
    ('w_gate_DF', (16, 32), (None, 'tensor'), (BATCH, 'tensor')),
    ('w_out_HUD', (2, 8, 16), ('tensor', None, None), ('tensor', BATCH, None)),
    ('w_out_HUD', (2, 4, 16), ('tensor', None, None), ('tensor', None, BATCH)),
    ('w_query_AHN', (4, 2, 4), (None, 'tensor', None), (None, 'tensor', None)),
    ('w_embedding_VD', (256, 16), ('tensor', None), ('tensor', BATCH)),
    ('w_head_DV', (16, 256), (None, 'tensor'), (BATCH, 'tensor')),
    ('w_router_DE', (12, 16), (None, None), (None, BATCH)),
    ('w_kv_down_DC', (16, 8), (None, None), (BATCH, None)),
    ('w_key_rope_DR', (12, 8), (None, None), (None, BATCH)),
    ('scale_D', (16,), (None,), (BATCH,)),
    ('scale_D', (12,), (None,), (None,)),
    # Stacked layers are never split, though 8 layers would divide.
    ('w_up_eDF', (8, 8, 16, 32), (None, 'expert', None, 'tensor'), (None, 'expert', 'data', 'tensor')),
    ('w_router_DE', (8, 16, 16), (None, None, None), (None, BATCH, None)),
    ('scale_D', (8, 16), (None, None), (None, BATCH)),
    ('scale_D', (8, 12), (None, None), (None, None)),
  ],
)
def test_place(name, shape, compute, stored):
  placed = sharding.place(name, shape, SIZES)
  spec = NamedSharding(abstract_mesh(tuple(SIZES.values())), placed.stored)
  assert placed.compute == P(*compute)
  assert spec.is_equivalent_to(NamedSharding(spec.mesh, P(*stored)), len(shape))
  assert placed.zero_axes == (('data',) if 'e' in name.rsplit('_', 1)[1] else BATCH)
  assert [i for i, (a, b) in enumerate(zip(compute, stored, strict=True)) if a != b] == (
    [] if placed.zero_dim is None else [placed.zero_dim]
  )


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('w_up_eDF', (6, 16, 32), 'axis e of size 6 must be divisible by the expert axis, 4'),
    ('w_up_eDF', (8, 16, 33), 'axis F of size 33 must be divisible by the tensor axis, 2'),
    ('w_out_HUD', (3, 8, 16), 'axis H of size 3 must be divisible by the tensor axis, 2'),
  ],
)
def test_an_axis_that_does_not_divide_is_refused(name, shape, message):
  with pytest.raises(UserError, match=f'{name}: {message}'):
    sharding.place(name, shape, SIZES)


def placed_leaves(config, mesh):
  """(path, shape, placement) of each parameter."""
  params = transformer.abstract_params(config)
  placements = jax.tree.leaves(
    sharding.place_tree(params, mesh), is_leaf=lambda node: isinstance(node, sharding.Placement)
  )
  return [
    (jax.tree_util.keystr(path), leaf.shape, placed)
    for (path, leaf), placed in zip(jax.tree.leaves_with_path(params), placements, strict=True)
  ]


@pytest.mark.parametrize('shape', [(1, 2, 4, 2), (1, 2, 8, 1), (1, 1, 16, 1), (1, 1, 1, 8), (1, 32, 64, 1)])
def test_every_v3_parameter_has_a_place(shape):
  """Each device computes with its expert and tensor part of a parameter, and stores its part of that."""
  mesh = abstract_mesh(shape)
  sizes = dict(mesh.shape)
  whole = {}
  for path, dims, placed in placed_leaves(load('deepseek_v3'), mesh):
    suffix = path.rsplit('_', 1)[1]
    split = (sizes['expert'] if 'e' in suffix else 1) * (sizes['tensor'] if set(suffix) & set('HFV') else 1)
    assert math.prod(NamedSharding(mesh, placed.compute).shard_shape(dims)) * split == math.prod(dims), path
    split *= sizes['data'] * (1 if 'e' in suffix else sizes['expert'])
    stored = math.prod(NamedSharding(mesh, placed.stored).shard_shape(dims))
    if stored * split != math.prod(dims):
      whole[path] = math.prod(dims)
  if math.prod(shape[1:3]) <= 128:
    assert not whole
  else:  # 2048 shards divide neither 7168 nor any rank: only experts are stored in parts
    assert not any('experts' in path for path in whole)


@pytest.fixture(scope='module')
def tiny(tiny_model):
  """A tiny model's config on which a few parameters divide over the batch axes and others do not; its parameters."""
  config = Config(model=dataclasses.replace(tiny_model, mtp_depth=0), precision=PrecisionConfig(compute='bfloat16'))
  rng = np.random.default_rng(0)
  shapes = transformer.abstract_params(config)
  return config, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def test_stored_shards_put_together_give_the_array(mesh_of, tiny):
  config, params = tiny
  mesh = mesh_of(data=2, expert=4, tensor=2)
  arrays = dict(jax.tree.leaves_with_path(params))
  divided = set()
  for (_, value), (path, _, placed) in zip(arrays.items(), placed_leaves(config, mesh), strict=True):
    stored = jax.device_put(value, NamedSharding(mesh, placed.stored))
    rebuilt = np.full_like(value, np.nan)
    for shard in stored.addressable_shards:
      rebuilt[shard.index] = shard.data
    np.testing.assert_array_equal(rebuilt, value, err_msg=path)
    divided.add(placed.zero_dim is not None)
  assert divided == {True, False}


def test_every_device_computes_with_the_gathered_weights(mesh_of, tiny):
  """Each batch shard gets the same weights, in the compute dtype, the router's and the norms' in float32."""
  config, params = tiny
  mesh = mesh_of(data=2, expert=4, tensor=2)
  placements = sharding.place_tree(params, mesh)
  spec_of = lambda attribute: jax.tree.map(attribute, placements, is_leaf=lambda p: isinstance(p, sharding.Placement))
  stored = spec_of(lambda placed: placed.stored)
  gather = jax.shard_map(
    lambda shards: jax.tree.map(lambda w: w[None], zero.gather(shards, placements, config.precision.compute)),
    mesh=mesh,
    in_specs=(stored,),
    out_specs=spec_of(lambda placed: P(placed.zero_axes, *placed.compute)),
  )
  gathered = jax.jit(gather)(jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), stored)))
  for (path, value), copies in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(gathered), strict=True):
    name = path[-1].key
    exact = name.startswith(('scale', 'w_router'))
    assert copies.dtype == ('float32' if exact else 'bfloat16'), name
    assert len(copies) == (2 if name.endswith(('eDF', 'eFD')) else 8), name
    expected = value if exact else value.astype(copies.dtype)
    for copy in np.asarray(copies):
      np.testing.assert_array_equal(copy, expected, err_msg=name)


@pytest.mark.parametrize(
  ('name', 'decayed'),
  [('w_up_eDF', True), ('w_router_DE', True), ('scale_D', False), ('scale_kv_C', False), ('w_embedding_VD', True)],
)
def test_weight_decay_is_for_matrices(name, decayed):
  assert sharding.is_matrix(name) is decayed
