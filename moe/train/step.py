"""The pure train and evaluation steps: one jit around one fully manual shard_map.

Inside the shard_map: fp32 masters, sharded over the batch axes (ZeRO-1), are cast to the compute dtype and gathered
once; each microbatch's gradient is taken with no reduction over the batch axes; they add up in float32 and are
reduce-scattered once. Outside, on global arrays: clipping, the optimizer and the router bias.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.balance import rules
from moe.config import Config
from moe.model import transformer
from moe.model.resolve import resolve as resolved_for
from moe.ops.varying import vary, varying_axes
from moe.parallel import sharding
from moe.parallel.mesh import BATCH_AXES, microbatches
from moe.parallel.resolved import Resolved
from moe.train import loss as losses
from moe.train import pipelined, state, zero
from moe.train.optimizer import bias_speed, learning_rate, make_optimizer
from moe.train.state import TrainState

BATCH_SPEC = P(None, BATCH_AXES)  # [microbatches, B, S + 1]


def resolve(config: Config, mesh, platform: str) -> Resolved:
  """The config with every 'auto' replaced by what it means on this mesh and platform (see `mesh.platform_of`).

  Raises:
    UserError: a backend or the FP8 policy does not run there.
  """
  number = microbatches(config, tuple(mesh.shape.values()))
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=number))
  return resolved_for(config, mesh.shape['expert'], platform)


def make_train_step(config: Resolved, mesh):
  """The jitted (state, batch) -> (state, metrics), with donated state.

  Args:
    config: from `resolve`.
    mesh: a Mesh, or an AbstractMesh to lower without devices.

  The batch is {'token_BS', 'segment_BS'}, int32 [microbatches, B, S + 1] sharded as BATCH_SPEC. Metrics are float32
  scalars, and 'load_LE', int32 assignments per router and expert over the whole batch.
  """
  steps = config.train.steps
  optimizer = make_optimizer(config.optimizer, steps)
  rate, speed = learning_rate(config.optimizer, steps), bias_speed(config.balance, steps)
  placements = sharding.place_tree(transformer.abstract_params(config), mesh)
  stored = sharding.stored(placements)
  find = pipelined.gradients if mesh.shape['pipe'] > 1 else _gradients
  gradients = jax.shard_map(
    lambda params, bias_LE, batch: find(params, bias_LE, batch, placements, config),
    mesh=mesh,
    in_specs=(stored, P(), BATCH_SPEC),
    out_specs=(stored, P(), P()),
  )

  def train_step(old: TrainState, batch: dict):
    with jax.default_matmul_precision(config.precision.matmul):
      grads, sums, counts = gradients(old.params, old.balance['bias_LE'], batch)
    updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
    params = jax.tree.map(jnp.add, old.params, updates)
    gamma = speed(old.step)
    balance = rules.update(old.balance, sums.router.load_E, sums.router.statistic, gamma, config.balance)
    metrics = _metrics(sums, counts, grads, balance, config)
    metrics |= {'learning_rate': rate(old.step), 'gamma': gamma}
    return TrainState(old.step + 1, params, balance, opt_state), metrics

  placed = state.shardings(config, mesh)
  replicated, batches = NamedSharding(mesh, P()), NamedSharding(mesh, BATCH_SPEC)
  return jax.jit(
    train_step, in_shardings=(placed, batches), out_shardings=(placed, replicated), donate_argnames=('old',)
  )


def make_eval_step(config: Resolved, mesh):
  """The jitted (params, bias_LE, batch) -> dict over a batch [1, B, S + 1]; routing is dropless.

  Sums over the batch: 'nats' [1 + mtp_depth] float32, 'predicted' [1 + mtp_depth] float32 positions counted, 'load_LE'
  int32. Of each token: 'nats_BS' and what each router gave it, 'expert_LBSK' and 'weight_LBSK' (`stats.Chosen`). This
  is where all that is told of single tokens comes from. What is not fetched costs its memory on the device only.
  """
  dropless = dataclasses.replace(config, dropless=True, each_token=True)
  placements = sharding.place_tree(transformer.abstract_params(config), mesh)
  stored = sharding.stored(placements)

  def found(params, bias_LE, batch):
    batch = jax.tree.map(lambda a: a[0], batch)
    model = transformer.build(config, zero.gather(params, placements, config.precision.compute), bias_LE)
    nats, stats, nats_BS = losses.forward(model, batch, dropless)
    predicted = losses.count_positions(batch, config.model.mtp_depth).predicted
    sums = losses.sum_over_mesh({'nats': nats, 'predicted': predicted, 'load_LE': stats.load_E})
    expert_LBSK, weight_LBSK = stats.chosen
    return sums, {'nats_BS': nats_BS}, {'expert_LBSK': expert_LBSK, 'weight_LBSK': weight_LBSK}

  of_tokens, of_routers = P(BATCH_AXES), P(None, BATCH_AXES)
  mapped = jax.shard_map(found, mesh=mesh, in_specs=(stored, P(), BATCH_SPEC), out_specs=(P(), of_tokens, of_routers))

  def eval_step(params, bias_LE, batch):
    with jax.default_matmul_precision(config.precision.matmul):
      sums, tokens, routers = mapped(params, bias_LE, batch)
    return sums | tokens | routers

  return jax.jit(eval_step, out_shardings=NamedSharding(mesh, P()))


def _gradients(params, bias_LE, batch, placements, config: Resolved):
  """Reduce-scattered gradients of the whole batch, its summed statistics and its counts; inside shard_map."""
  weights = zero.gather(params, placements, config.precision.compute)
  counts = losses.count_batch(batch, config.model.mtp_depth)

  def microbatch_loss(weights, micro, earlier_load_LE):
    return losses.loss(transformer.build(config, weights, bias_LE), micro, counts, earlier_load_LE, config)

  def add(carry, micro):
    total, sums = carry
    grads, new = gradient(weights, micro, sums.router.load_E)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), (total, sums), (grads, new)), None

  first, no_load_LE = jax.tree.map(lambda a: a[0], batch), vary(jnp.zeros(bias_LE.shape, jnp.int32), BATCH_AXES)
  gradient = jax.grad(microbatch_loss, has_aux=True)
  if len(batch['token_BS']) == 1:  # nothing to add up, so no float32 copy of the gradients is kept
    total, sums = gradient(weights, first, no_load_LE)
  else:
    start = (
      jax.tree.map(lambda w: vary(jnp.zeros(w.shape, jnp.float32), varying_axes(w)), weights),
      jax.tree.map(
        lambda a: vary(jnp.zeros(a.shape, a.dtype), BATCH_AXES),
        jax.eval_shape(lambda: microbatch_loss(weights, first, no_load_LE)[1]),
      ),
    )
    (total, sums), _ = lax.scan(add, start, batch)
  return zero.reduce(total, params, placements), losses.sum_over_mesh(sums), counts


def _metrics(sums: losses.Sums, counts: losses.Counts, grads, balance, config: Config) -> dict:
  """Scalars of one step, and load_LE."""
  model = config.model
  means = sums.nats / jnp.maximum(counts.predicted, 1)
  routed = jnp.maximum(counts.routed, 1)
  assignments = jnp.maximum(sums.router.load_E.sum(), 1)
  routed_L = jnp.concatenate([jnp.broadcast_to(routed[:1], (model.num_moe_layers,)), routed[1:]])
  mtp_loss = means[1:].mean() if model.mtp_depth else jnp.zeros(())
  metrics = {
    'loss': means[0],
    'total_loss': means[0] + config.train.mtp_weight * mtp_loss + sums.aux + sums.z,
    'mtp_loss': mtp_loss,
    'aux_loss': sums.aux,
    'z_loss': sums.z,
    'batch_tokens': counts.predicted[0],
    'drop_rate': sums.router.dropped.sum() / assignments,
    'gate_entropy': (sums.router.entropy_sum / routed_L).mean(),
    'bias_min': balance['bias_LE'].min(),
    'bias_max': balance['bias_LE'].max(),
    'load_LE': sums.router.load_E,
  }
  squares: dict[str, jax.Array | float] = {}
  for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
    group = parameter_group(path)
    squares[group] = squares.get(group, 0.0) + jnp.sum(grad * grad)
  metrics |= {f'grad_norm/{group}': jnp.sqrt(square) for group, square in sorted(squares.items())}
  return metrics | {'grad_norm': jnp.sqrt(sum(squares.values()))}


def parameter_group(path) -> str:
  """The group a parameter's gradient norm is reported under."""
  keys = [key.key for key in path]
  name = keys[-1]
  if keys[0] == 'mtp':
    return 'mtp'
  if name.startswith('scale'):
    return 'norm'
  if name.startswith(('w_router', 'w_embedding', 'w_head')):
    return name.split('_')[1]
  return next(part for part in ('attention', 'experts', 'shared', 'ffn') if part in keys)
