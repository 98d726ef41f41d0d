"""The mixture of experts as a layer of any model: plain functions of arrays, with or without a mesh.

    layer = moe.MoE(d_model=512, d_expert=256, num_experts=64, top_k=6)
    params, balance = layer.init(key), layer.init_balance()
    y_BSD, stats = layer.apply(params, balance['bias_E'], x_BSD)       # differentiable in params and x
    balance = layer.update_bias(balance, stats)                        # once per optimizer step

`modules.py` has it as an NNX and as a Linen module.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.balance import losses, rules
from moe.balance.stats import RouterStats
from moe.config import KINDS, BalanceConfig, Config, ModelConfig, PrecisionConfig, from_config_dict, nearest
from moe.errors import UserError
from moe.model import layer, layer_inputs
from moe.model.parameters import Init, is_float32
from moe.model.resolve import resolve
from moe.parallel.mesh import platform_of_device
from moe.parallel.resolved import Axes, Resolved

SECTIONS = {'model': ModelConfig, 'balance': BalanceConfig, 'precision': PrecisionConfig}


class Stats(NamedTuple):
  """What a call of the layer counts, over all shards; calls of one optimizer step (microbatches) add up, by + or `sum`.

  load_E: int32 assignments per expert, of unmasked tokens, before dropping. dropped: int32 assignments over capacity.
  tokens: int32 unmasked tokens. loss: float32, the configured auxiliary loss and z-loss, weighted, to be added to the
  model's loss (differentiable; 0 without either). entropy_sum: float32, of the tokens' scores, 1 each if they are even.
  statistic: int32, what the bias rule wants to know besides, else of no size.
  """

  load_E: jax.Array
  dropped: jax.Array
  tokens: jax.Array
  loss: jax.Array
  entropy_sum: jax.Array
  statistic: jax.Array

  def __add__(self, other: 'Stats') -> 'Stats':  # type: ignore[override]  # a tuple's would join them
    return jax.tree.map(jnp.add, self, other)

  def __radd__(self, other) -> 'Stats':
    return self + other if isinstance(other, Stats) else self  # `sum` begins with 0


class MoE:
  """Settings of one layer, and its pure functions. Two of the same settings are equal, and it can be a static argument.

  Args:
    mesh: the caller's, where experts or tokens are divided; `apply` is then called on global arrays, as in jit. Without
      one, but with names of axes, it is called inside the caller's own `shard_map`, on shards.
    batch_axes: names of the mesh axes that the batch is sharded over.
    expert_axis: name of the axis that experts are sharded over; the batch is, too, whether batch_axes name it or not.
    tensor_axis: name of the axis that the experts' hidden width is sharded over.
    init_std: standard deviation of fresh weights.
    settings: of `moe.config`'s sections model, balance and precision, and dispatch and grouped_matmul, by their names:
      d_model, d_expert, num_experts, top_k, num_shared_experts, capacity_factor, bias_rule, aux_loss, compute, fp8, ...

  Raises:
    UserError: an unknown setting, what cannot run together, an axis that the mesh has not, that is named twice, or that
      does not divide.
  """

  def __init__(
    self,
    *,
    mesh: Mesh | None = None,
    batch_axes: Iterable[str] = (),
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
    init_std: float = 0.02,
    **settings,
  ):
    config = _config(settings)
    batch = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    batch += (expert_axis,) if expert_axis and expert_axis not in batch else ()
    axes = Axes(batch, expert_axis, tensor_axis)
    self.mesh, self.init_std, self.settings = mesh, init_std, tuple(sorted(settings.items()))
    self.config = _resolve(config, axes, mesh)

  def _key(self):
    return self.mesh, self.init_std, self.config

  def __eq__(self, other):
    return isinstance(other, MoE) and self._key() == other._key()

  def __hash__(self):
    return hash(self._key())

  def __repr__(self):
    return f'MoE({", ".join(f"{key}={value!r}" for key, value in self.settings)})'

  def init(self, key: jax.Array) -> dict:
    """Fresh float32 parameters, a nested dict: 'w_router_DE', 'experts', and 'shared' if there are shared experts."""
    return nnx.to_pure_dict(nnx.split(self.module(nnx.Rngs(params=key)))[1])

  def module(self, rngs: nnx.Rngs) -> layer.MoE:
    """The parameters' NNX module."""
    return layer.MoE(self.config.model, Init(rngs, self.init_std))

  def shardings(self) -> dict:
    """Where `apply` wants the parameters on the mesh: a NamedSharding each."""
    mesh = self.mesh
    if mesh is None:
      raise UserError('this MoE layer was made without mesh=..., so its parameters have no shardings')
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs())

  def specs(self) -> dict:
    """The PartitionSpec of each parameter."""
    return jax.tree.map_with_path(
      lambda path, _: _spec(path[-1].key, self.config.axes), nnx.to_pure_dict(self._abstract()[1])
    )

  def init_balance(self) -> dict[str, jax.Array]:
    """The bias rule's state, float32: 'bias_E', and what else the rule keeps. No gradient, no weight decay, no cast."""
    return _without_layers(rules.init(self.config.balance, 1, self.config.model.num_experts))

  def apply(
    self,
    params: dict,
    bias_E: jax.Array,
    x_BSD: jax.Array,
    mask_BS: jax.Array | None = None,
    dropless: bool = False,
  ) -> tuple[jax.Array, Stats]:
    """Routes tokens to experts and back.

    Args:
      params: as from `init`, of any float dtype; cast to precision.compute, but for the router.
      bias_E: float32 routing bias.
      x_BSD: what the layer reads: [B, S, D], normed where the model has a norm. B is divisible by the batch axes.
      mask_BS: bool, False for tokens that are neither routed nor counted; all are if None.
      dropless: ignore the capacity factor, as in evaluation.

    Returns:
      y_BSD in precision.compute, to be added to the residual stream; `Stats`.

    Raises:
      UserError: arrays of other shapes or kinds than these, such as parameters that are not this shard's.
    """
    B, S, _ = layer_inputs.shape_of_x(x_BSD, self.config.model.d_model)
    mask_BS = jnp.ones((B, S), bool) if mask_BS is None else mask_BS
    layer_inputs.check('mask_BS', mask_BS, (B, S), bool)
    layer_inputs.check('bias_E', bias_E, (self.config.model.num_experts,), float)
    layer_inputs.check_tree('params', params, self._shapes(), 'init()')
    config = dataclasses.replace(self.config, dropless=dropless)
    run = functools.partial(self._local, config)
    if self.mesh is not None:
      _check_batch(x_BSD, config.axes.batch, self.mesh)
      rows = P(config.axes.batch or None)
      stats = Stats._make(P() for _ in Stats._fields)
      in_specs = self.specs(), P(), rows, rows
      params, bias_E, x_BSD, mask_BS = _placed((params, bias_E, x_BSD, mask_BS), in_specs, self.mesh)
      run = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=(rows, stats))
    with jax.default_matmul_precision(config.precision.matmul):
      return run(params, bias_E, x_BSD, mask_BS)

  def update_bias(self, balance: dict, stats: Stats, gamma: jax.Array | float | None = None) -> dict:
    """The rule's state after an optimizer step: from `Stats` of all tokens of the step, added up.

    Args:
      balance: as from `init_balance`.
      gamma: speed of this step, at most the setting gamma, which it is if None.

    Raises:
      UserError: the state or the statistics are of another layer.
    """
    settings = self.config.balance
    layer_inputs.check_tree('balance', balance, jax.eval_shape(self.init_balance), 'init_balance()')
    if not isinstance(stats, Stats):
      raise UserError(f'stats must be the Stats that apply returns second, not {type(stats).__name__}')
    layer_inputs.check('stats.load_E', stats.load_E, (self.config.model.num_experts,), int)
    if isinstance(gamma, int | float) and not 0 <= gamma < math.inf:
      raise UserError(f'gamma = {gamma!r} must be 0 or more')
    state = {f'{name[:-1]}LE': value[None] for name, value in balance.items()}
    speed = jnp.float32(settings.gamma if gamma is None else gamma)
    return _without_layers(rules.update(state, stats.load_E[None], stats.statistic[None], speed, settings))

  def _abstract(self):
    """The module's graph, and its parameters' shapes."""
    return nnx.split(nnx.eval_shape(lambda: self.module(nnx.Rngs(0))))

  def _shapes(self) -> dict:
    """Of the parameters where `apply` is called: whole, or inside the caller's own shard_map a shard's."""
    shapes = nnx.to_pure_dict(self._abstract()[1])
    if self.mesh is not None:
      return shapes
    try:
      sizes = {axis: lax.axis_size(axis) for axis in (*self.config.axes.batch, self.config.axes.tensor) if axis}
    except NameError as error:
      raise UserError(
        f'this MoE layer was given names of axes and no mesh=..., so apply belongs inside shard_map: {error}'
      ) from error
    shard = lambda a, spec: [size // sizes.get(axis, 1) for size, axis in zip(a.shape, spec, strict=True)]
    return jax.tree.map(lambda a, spec: jax.ShapeDtypeStruct(shard(a, spec), a.dtype), shapes, self.specs())

  def _local(self, config: Resolved, params, bias_E, x_BSD, mask_BS):
    """`apply` for one shard."""
    compute, axes = jnp.dtype(config.precision.compute), config.axes
    cast = lambda path, w: w if is_float32(path[-1].key) else w.astype(compute)
    graph, state = self._abstract()
    nnx.replace_by_pure_dict(state, jax.tree.map_with_path(cast, params))
    y_BSD, found = nnx.merge(graph, state).mix(jnp.asarray(x_BSD, compute), mask_BS, bias_E, config)
    if axes.tensor:
      y_BSD = lax.psum(y_BSD, axes.tensor)
    over_batch = lambda value: lax.psum(value, axes.batch) if axes.batch else value
    tokens = over_batch(mask_BS.sum(dtype=jnp.int32))
    loss = over_batch(_loss(found, tokens, config))
    counts = jax.tree.map(over_batch, (found.load_E, found.dropped, found.entropy_sum, found.statistic))
    load_E, dropped, entropy_sum, statistic = counts
    return y_BSD, Stats(load_E, dropped, tokens, loss, lax.stop_gradient(entropy_sum), statistic)


def _loss(found: RouterStats, tokens, config: Resolved):
  """This shard's part of the auxiliary loss and the z-loss."""
  stacked = jax.tree.map(lambda leaf: leaf[None], found)
  tokens_L = jnp.maximum(tokens, 1).astype(jnp.float32)[None]
  aux, z = losses.auxiliary(stacked, tokens_L, jnp.zeros_like(stacked.load_E), config)
  return aux + z


def _without_layers(state: dict) -> dict:
  return {f'{name[:-2]}E': value[0] for name, value in state.items()}


def _spec(name: str, axes: Axes) -> P:
  """Experts over the expert axis, hidden width over the tensor axis; all else is replicated."""
  over = {'e': axes.expert, 'F': axes.tensor}
  return P(*(over.get(letter) for letter in name.rsplit('_', 1)[-1]))


def _config(settings: dict) -> Config:
  """The checked config of settings by their names without section."""
  known = {key.rpartition('.')[2]: key for key in KINDS if key.partition('.')[0] in SECTIONS or '.' not in key}
  for name in settings:
    if name not in known:
      raise UserError(f'MoE has no setting {name!r}; the nearest valid one is {nearest(name, known)!r}')
  return from_config_dict(dataclasses.asdict(Config()), {known[name]: value for name, value in settings.items()})


def _resolve(config: Config, axes: Axes, mesh: Mesh | None) -> Resolved:
  """With every 'auto' replaced, and what the mesh cannot divide refused."""
  named = [axis for axis in (*axes.batch, axes.tensor) if axis]
  if bad := [axis for axis in [*named, axes.expert] if axis is not None and not isinstance(axis, str)]:
    raise UserError(f'{bad[0]!r} must be the name of one axis of the mesh')
  if twice := [axis for axis in named if named.count(axis) > 1]:
    raise UserError(f'axis {twice[0]!r} is named twice, and can divide one thing only: batch and experts, or tensor')
  sizes = dict(mesh.shape) if mesh is not None else {}
  for name in [*axes.batch, axes.expert, axes.tensor]:
    if name and mesh is not None and name not in sizes:
      raise UserError(f'the mesh has no axis {name!r}; its axes are {", ".join(map(repr, sizes))}')
  model = config.model
  for what, value, axis in (
    ('num_experts', model.num_experts, axes.expert),
    ('d_expert', model.d_expert, axes.tensor),
  ):
    if value % sizes.get(axis, 1):
      raise UserError(f'{what} = {value} must be divisible by the size of the axis {axis!r}, {sizes[axis]}')
  if axes.expert is None and config.dispatch not in ('auto', 'local'):
    raise UserError(f'dispatch = {config.dispatch!r} needs expert_axis=..., the name of the axis that divides experts')
  divided = axes.expert is not None and sizes.get(axes.expert, 2) > 1
  if divided and config.dispatch == 'local':
    raise UserError(f"dispatch = 'local' works on one expert shard, and the axis {axes.expert!r} divides the experts")
  device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
  return resolve(config, 2 if divided else 1, platform_of_device(device), axes)


def _placed(arguments, specs, mesh):
  """On a mesh of explicit axes, arrays do not move by themselves."""
  if AxisType.Explicit not in mesh.axis_types:
    return arguments
  move = lambda spec, tree: jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(mesh, spec)), tree)
  return jax.tree.map(move, specs, arguments, is_leaf=lambda node: isinstance(node, P))


def _check_batch(x_BSD, batch_axes, mesh):
  shards = math.prod(mesh.shape[axis] for axis in batch_axes)
  if len(x_BSD) % shards:
    raise UserError(f'a batch of {len(x_BSD)} sequences cannot be divided by {shards} shards over {batch_axes}')
