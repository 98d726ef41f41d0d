"""The standalone layer says in a line what it cannot take: arrays of other shapes or kinds, another layer's state."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import moe
from moe.errors import UserError

LAYER = moe.MoE(d_model=16, d_expert=8, num_experts=8, top_k=2)
OTHER = moe.MoE(d_model=16, d_expert=4, num_experts=16, top_k=2)
KEY = jax.random.key(0)
X_BSD = jax.random.normal(KEY, (2, 5, 16))
BIAS_E = jnp.zeros(8)


@pytest.mark.parametrize(
  ('given', 'says'),
  [
    ({'x_BSD': X_BSD[0]}, r'x_BSD must be an array \[B, S, 16\] .* not an array of shape \(5, 16\)'),
    ({'x_BSD': X_BSD[..., :8]}, r'not an array of shape \(2, 5, 8\)'),
    ({'x_BSD': X_BSD[:0]}, r'at least 1, not an array of shape \(0, 5, 16\)'),
    ({'x_BSD': [1.0]}, 'not list'),
    ({'x_BSD': X_BSD.astype('complex64')}, 'real numbers, not complex64'),
    ({'mask_BS': jnp.ones((5, 2), bool)}, r'mask_BS must be bool \[2, 5\], not bool \[5, 2\]'),
    ({'mask_BS': jnp.ones((2, 5), int)}, r'not int32 \[2, 5\]'),
    ({'bias_E': 0.0}, r'bias_E must be float \[8\], not float'),
    ({'bias_E': jnp.zeros((10, 8))}, r'not float32 \[10, 8\]'),
    ({'bias_E': LAYER.init_balance()}, 'not dict'),
    (
      {'params': {'params': LAYER.init(KEY)}},
      'params must have .* as init.. makes them; missing or unknown: .*params.',
    ),
    ({'params': OTHER.init(KEY)}, r'params: experts.w_down_eFD must be float \[8, 8, 16\], not float32 \[16, 4, 16\]'),
  ],
)
def test_apply(given, says):
  arguments = {'params': LAYER.init(KEY), 'bias_E': BIAS_E, 'x_BSD': X_BSD} | given
  with pytest.raises(UserError, match=says):
    LAYER.apply(**arguments)


@pytest.mark.parametrize(
  ('given', 'says'),
  [
    ({'balance': BIAS_E}, 'balance must be the dict that init_balance'),
    ({'balance': OTHER.init_balance()}, r'balance: bias_E must be float \[8\], not float32 \[16\]'),
    ({'stats': (1, 2)}, 'must be the Stats that apply returns second, not tuple'),
    ({'gamma': -1.0}, 'gamma = -1.0 must be 0 or more'),
  ],
)
def test_update_bias(given, says):
  _, stats = LAYER.apply(LAYER.init(KEY), BIAS_E, X_BSD)
  with pytest.raises(UserError, match=says):
    LAYER.update_bias(**{'balance': LAYER.init_balance(), 'stats': stats, **given})


def test_stats_add_up():
  _, one = LAYER.apply(LAYER.init(KEY), BIAS_E, X_BSD)
  for both in (one + one, sum([one, one])):
    assert isinstance(both, moe.model.standalone.Stats)
    assert int(both.tokens) == 20
    assert (both.load_E == 2 * one.load_E).all()


def test_axes():
  mesh = jax.make_mesh((2, 2), ('dp', 'ep'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
  for axes in ({'batch_axes': 'dp', 'tensor_axis': 'dp'}, {'batch_axes': ('dp', 'dp')}):
    with pytest.raises(UserError, match="axis 'dp' is named twice"):
      moe.MoE(d_model=16, d_expert=8, num_experts=8, top_k=2, mesh=mesh, **axes)
  with pytest.raises(UserError, match=r"\('dp', 'ep'\) must be the name of one axis"):
    moe.MoE(d_model=16, d_expert=8, num_experts=8, top_k=2, mesh=mesh, expert_axis=('dp', 'ep'))
  inside = moe.MoE(d_model=16, d_expert=8, num_experts=8, top_k=2, batch_axes='dp', expert_axis='ep')
  with pytest.raises(UserError, match='so apply belongs inside shard_map'):
    inside.apply(LAYER.init(KEY), BIAS_E, X_BSD)
  # The commonest slip in one's own shard_map: parameters that are not divided as `specs` says.
  run = lambda params, x: inside.apply(params, BIAS_E, x)[0]
  whole = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(('dp', 'ep'))), out_specs=P(('dp', 'ep')))
  with pytest.raises(
    UserError, match=r'params: experts.w_down_eFD must be float \[4, 8, 16\], not float32 \[8, 8, 16\]'
  ):
    whole(LAYER.init(KEY), jnp.concatenate([X_BSD, X_BSD]))
