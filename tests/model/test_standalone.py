"""The layer by itself, as other models use it: against the numpy oracle, on one device and on meshes of other names."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from processes import environment

import moe
from moe.errors import UserError
from moe.files.paths import PACKAGE
from moe.registry import BIAS_RULES

B, S, D, F, E, K = 8, 6, 16, 8, 8, 2
SIZES = {'d_model': D, 'd_expert': F, 'num_experts': E, 'top_k': K, 'init_std': 0.3, 'matmul': 'highest'}


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  x_BSD, dy_BSD = (rng.normal(size=(B, S, D)).astype(np.float32) for _ in range(2))
  bias_E = rng.normal(size=E).astype(np.float32) / 4
  mask_BS = rng.random((B, S)) < 0.8
  mask_BS[2] = False
  return x_BSD, dy_BSD, bias_E, mask_BS


@functools.cache
def mesh(explicit=False):
  """Axes in another order and by other names than ours."""
  kind = AxisType.Explicit if explicit else AxisType.Auto
  return jax.make_mesh((2, 2, 2), ('tp', 'ep', 'fsdp'), axis_types=(kind,) * 3, devices=jax.devices()[:8])


def on_mesh(explicit=False, **settings):
  axes = {'batch_axes': 'fsdp', 'expert_axis': 'ep', 'tensor_axis': 'tp'}
  return moe.MoE(mesh=mesh(explicit), **(SIZES | axes | settings))


def value_and_gradients(layer, params, arguments, dropless=False):
  """(y, stats, gradients of params and x) of sum(y dy) + the layer's own loss."""
  x_BSD, dy_BSD, bias_E, mask_BS = arguments

  def loss(params, x_BSD):
    y_BSD, stats = layer.apply(params, bias_E, x_BSD, mask_BS, dropless)
    return (y_BSD * dy_BSD).sum() + stats.loss, (y_BSD, stats)

  (_, (y_BSD, stats)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BSD)
  return jax.device_get((y_BSD, stats, grads))


def expected(layer, params, arguments):
  """y of the naive float64 mixture of experts, token by token; the loads."""
  x_BSD, _, bias_E, mask_BS = arguments
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x_TD = x_BSD.reshape(-1, D).astype(np.float64)
  found = oracle.route(x_TD, p['w_router_DE'], bias_E.astype(np.float64), mask_BS.ravel(), layer.config.model)
  matrices = [p['experts'][name] for name in ('w_gate_eDF', 'w_up_eDF', 'w_down_eFD')]
  y_TD = oracle.experts(x_TD, found.weight_TE, found.kept_TE, *matrices)
  shared = [p['shared'][name] for name in ('w_gate_DF', 'w_up_DF', 'w_down_FD')]
  y_TD = y_TD + np.stack([oracle.swiglu(x_D, *shared) for x_D in x_TD])
  return y_TD.reshape(B, S, D), found.load_E


@pytest.mark.parametrize(
  'settings', [{}, {'capacity_factor': 0.8}, {'score_fn': 'softmax', 'num_groups': 4, 'top_groups': 2}]
)
def test_one_device_is_the_oracle(settings):
  layer, arguments = moe.MoE(**SIZES, **settings), inputs()
  params = layer.init(jax.random.key(1))
  y_BSD, stats, _ = value_and_gradients(layer, params, arguments)
  want_BSD, load_E = expected(layer, params, arguments)
  np.testing.assert_allclose(y_BSD, want_BSD, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(stats.load_E, load_E)
  assert stats.tokens == arguments[3].sum()
  assert (stats.dropped > 0) == ('capacity_factor' in settings)


@pytest.mark.parametrize(
  'settings',
  [
    {'dispatch': 'all_to_all', 'aux_loss': 'switch', 'aux_alpha': 0.1, 'z_loss': 0.01},
    {'aux_loss': 'sequence', 'aux_alpha': 0.1, 'num_shared_experts': 0},
    {'bias_rule': 'quantile'},
  ],
  ids=str,
)
def test_the_callers_mesh_gives_the_same(settings):
  """Values, statistics and gradients, of axes that are neither named nor ordered as ours."""
  one, many = moe.MoE(**SIZES, **{**settings, 'dispatch': 'auto'}), on_mesh(**settings)
  params, arguments = one.init(jax.random.key(1)), inputs()
  placed = jax.device_put(params, many.shardings())
  assert placed['experts']['w_up_eDF'].sharding.spec == P('ep', None, 'tp')
  (y, stats, grads), (y_many, stats_many, grads_many) = (
    value_and_gradients(layer, p, arguments) for layer, p in ((one, params), (many, placed))
  )
  np.testing.assert_allclose(y_many, y, rtol=1e-5, atol=1e-6)
  for name, got, want in zip(stats._fields, stats_many, stats, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
  for got, want in zip(jax.tree.leaves(grads_many), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
  balance = one.init_balance()
  for got, want in zip(
    many.update_bias(balance, stats_many).values(), one.update_bias(balance, stats).values(), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_explicit_axes():
  layer, arguments = on_mesh(explicit=True), inputs()
  params = layer.init(jax.random.key(1))
  y_BSD, stats, _ = value_and_gradients(layer, params, arguments)
  want_BSD, load_E = expected(layer, params, arguments)
  np.testing.assert_allclose(y_BSD, want_BSD, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(stats.load_E, load_E)


def test_inside_the_callers_shard_map():
  layer = moe.MoE(expert_axis='ep', batch_axes=('fsdp',), **SIZES)
  outer, arguments = on_mesh(tensor_axis=None), inputs()
  params, rows = layer.init(jax.random.key(1)), P(('fsdp', 'ep'))
  run = jax.shard_map(
    lambda params, x_BSD, mask_BS: layer.apply(params, arguments[2], x_BSD, mask_BS)[0],
    mesh=mesh(),
    in_specs=(outer.specs(), rows, rows),
    out_specs=rows,
  )
  want_BSD, _ = expected(layer, params, arguments)
  np.testing.assert_allclose(jax.jit(run)(params, arguments[0], arguments[3]), want_BSD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rule', BIAS_RULES)
def test_every_rule_balances_or_leaves_the_bias(rule):
  layer = moe.MoE(**SIZES, bias_rule=rule, gamma=0.02)
  params, x_BSD = layer.init(jax.random.key(1)), inputs()[0] + 1  # a mean makes some experts favourites
  balance = layer.init_balance()

  @jax.jit
  def step(balance):
    return layer.update_bias(balance, stats := layer.apply(params, balance['bias_E'], x_BSD)[1]), stats.load_E

  loads = []
  for _ in range(40):
    balance, load_E = step(balance)
    loads.append(load_E)
  first, last = (oracle.max_vio(np.asarray(load_E)) for load_E in (loads[0], loads[-1]))
  assert (last == first) if rule == 'none' else (last < first / 2)


def test_fp8_and_bfloat16():
  layer = moe.MoE(**SIZES, compute='bfloat16', fp8='experts,ffn')
  exact, arguments = moe.MoE(**SIZES), inputs()
  params = exact.init(jax.random.key(1))
  y, want = (value_and_gradients(one, params, arguments)[0] for one in (layer, exact))
  assert y.dtype == jnp.bfloat16
  assert 1e-3 < np.linalg.norm(y.astype(np.float32) - want) / np.linalg.norm(want) < 0.1


def test_modules_learn_and_their_bias_has_no_gradient():
  layer = moe.MoE(**SIZES)
  x_BSD, target_BSD, *_ = inputs()
  error = lambda y_BSD: ((y_BSD - target_BSD) ** 2).mean()

  module = moe.NNXMoE(layer, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(module, optax.adam(3e-2), wrt=nnx.Param)

  @nnx.jit
  def step(module, optimizer):
    (loss, stats), grads = nnx.value_and_grad(lambda m: (lambda y, stats: (error(y), stats))(*m(x_BSD)), has_aux=True)(
      module
    )
    optimizer.update(module, grads)
    module.update_bias(stats)
    return loss

  losses = [float(step(module, optimizer)) for _ in range(30)]
  assert losses[-1] < losses[0] / 2
  assert np.abs(module.bias_E[...]).max() > 0

  flax_module = moe.LinenMoE(layer)
  variables = flax_module.init(jax.random.key(0), x_BSD)
  assert set(variables) == {'params', 'balance'}
  y_BSD, stats = flax_module.apply(variables, x_BSD)
  want_BSD, _ = layer.apply(variables['params']['moe'], variables['balance']['state']['bias_E'], x_BSD)
  np.testing.assert_array_equal(y_BSD, want_BSD)
  assert stats.load_E.sum() == B * S * K
  assert isinstance(flax_module, linen.Module)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'num_expert': 4}, "no setting 'num_expert'; the nearest valid one is 'num_experts'"),
    ({'top_k': 99}, 'config model.top_k = 99'),
    ({'bias_rule': 'magic'}, 'balance.bias_rule'),
    ({'dispatch': 'all_to_all'}, 'needs expert_axis'),
    ({'mesh': 'mesh', 'expert_axis': 'experts'}, "no axis 'experts'; its axes are 'tp', 'ep', 'fsdp'"),
    ({'mesh': 'mesh', 'expert_axis': 'ep', 'num_experts': 9}, 'num_experts = 9 must be divisible'),
    ({'mesh': 'mesh', 'expert_axis': 'ep', 'dispatch': 'local'}, "'local' works on one expert shard"),
  ],
)
def test_mistakes_are_one_line(settings, message):
  settings = {key: mesh() if value == 'mesh' else value for key, value in settings.items()}
  with pytest.raises(UserError, match=message):
    moe.MoE(**(SIZES | settings))


def test_a_batch_that_does_not_divide():
  layer = on_mesh()
  with pytest.raises(UserError, match='batch of 6 sequences cannot be divided by 4 shards'):
    layer.apply(layer.init(jax.random.key(0)), jnp.zeros(E), jnp.zeros((6, S, D)))


def test_settings_are_static():
  assert moe.MoE(**SIZES) == moe.MoE(**SIZES)
  assert hash(moe.MoE(**SIZES)) == hash(moe.MoE(**SIZES))
  assert moe.MoE(**SIZES) != moe.MoE(**(SIZES | {'top_k': 1}))
  assert dataclasses.is_dataclass(moe.MoE(**SIZES).config)


def test_it_loads_neither_data_nor_checkpoints_nor_figures():
  code = (
    'import jax, flax.nnx, flax.linen, sys; before = set(sys.modules); import moe\n'
    'layer = moe.MoE(d_model=16, d_expert=8, num_experts=8, top_k=2); layer.init(jax.random.key(0))\n'
    'new = set(sys.modules) - before; print(len(new), *{name.split(".")[0] for name in new})'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=PACKAGE.parent, env=environment(), capture_output=True, text=True, check=True
  )
  count, *packages = done.stdout.split()
  assert not {'grain', 'orbax', 'matplotlib', 'tensorboardX', 'tokenizers', 'tensorstore'} & set(packages)
  assert int(count) < 250
