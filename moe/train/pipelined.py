"""The gradients of a step in a pipeline: the model as stages for `moe.parallel.pipeline`, whatever the schedule.

The first stage has the embedding and the dense layers besides, the last one the head and the MTP modules. All ranks
hold these weights (and a tied or shared embedding needs no care); of MoE layers a rank holds those of its stages.
Everything a step counts is summed over stages as over microbatches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.losses import auxiliary
from moe.balance.stats import RouterStats
from moe.config import Config
from moe.model import flops, transformer
from moe.model.layer import stack_stats
from moe.ops.varying import vary
from moe.parallel import pipeline, simulate
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved
from moe.parallel.schedule import Schedule, make
from moe.parallel.stages import Role, Stages
from moe.train import loss as losses
from moe.train import zero

VARYING = ('pipe', *BATCH_AXES)


def plan(config: Config, ranks: int) -> tuple[Schedule, Stages]:
  """The schedule of train.schedule, packed for the model's stages, and which layers they have.

  Args:
    config: train.microbatches is known.
    ranks: of the pipeline.

  Raises:
    UserError: the schedule cannot have so many ranks, microbatches or layers.
  """
  work = flops.stage_work(config)
  schedule = make(config.train.schedule, ranks, config.train.microbatches, work.times)
  return schedule, Stages.of(schedule, config.model.num_moe_layers, work.first, work.last)


def describe(config: Config, ranks: int) -> str:
  """The pipeline in a line: its schedule, stages and bubble; arguments and errors as of `plan`."""
  schedule, stages = plan(config, ranks)
  times = flops.stage_work(config).times
  waits = simulate.bubble(schedule, times, lockstep=True)
  busy = max(sum(times.of(row[rank]) for row in schedule.table) for rank in range(ranks))
  layers = ' + '.join(map(str, stages.counts))
  return (
    f'{schedule.name} of {schedule.stages} stages with {layers} MoE layers, {config.train.microbatches} microbatches; '
    f'a rank waits {waits / (waits + busy):.0%} of a step and keeps {max(simulate.most_held(schedule))} forward passes'
  )


def gradients(params, bias_LE, batch, placements, config: Resolved):
  """Reduce-scattered gradients of the whole batch, its summed statistics and its counts; inside shard_map.

  Args:
    params: stored shards.
    bias_LE: float32 routing bias.
    batch: {'token_BS', 'segment_BS'}, [microbatches, B, S + 1] of this shard.
    placements: of the parameters.
    config: of the whole run.
  """
  schedule, stages = plan(config, lax.axis_size('pipe'))
  rows_RN = stages.rows.reshape(len(stages.rows), -1)
  weights = zero.gather(params, placements, config.precision.compute, rows_RN)
  counts = losses.count_batch(batch, config.model.mtp_depth)
  stacked = weights.pop('layers')
  unrolled = config.train.unroll_layers >= stages.rows.shape[-1]

  def by_slot(stacked):
    """[slots x layers of a stage, ...] -> a tree per slot, of single layers or of stacked ones."""
    _, slots, layers = stages.rows.shape
    at = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    apart = jax.tree.map(lambda a: a.reshape(slots, layers, *a.shape[1:]), stacked)
    of_slots = [at(apart, slot) for slot in range(slots)]
    return [[at(one, l) for l in range(layers)] for one in of_slots] if unrolled else of_slots

  batch_shape = batch['token_BS'].shape
  shape = batch_shape[1], batch_shape[2] - 1, config.model.d_model
  x_like = vary(jnp.zeros(shape, config.precision.compute), VARYING)
  kinds = sorted(set(map(stages.role, range(len(stages.counts)))))
  slots = by_slot(stacked)
  no_stats = _no_stats(slots[0], x_like, batch['segment_BS'][0, :, :-1], config)
  forwards = [_stage(role, bias_LE, counts, no_stats, stages, config) for role in kinds]
  roles = [[kinds.index(stages.role(stage)) for stage in row] for row in stages.stage_of.tolist()]
  found = pipeline.run(schedule, forwards, roles, weights, slots, batch, x_like)
  as_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), stacked)
  (of_layers,) = jax.linear_transpose(by_slot, as_float32)(found.layers)
  grads = zero.reduce({**found.shared, 'layers': of_layers}, params, placements, rows_RN)
  return grads, jax.tree.map(lambda a: lax.psum(a, VARYING), found.sums), counts


def _stage(role: Role, bias_LE, counts: losses.Counts, no_stats: RouterStats, stages: Stages, config) -> Callable:
  """The `forward` of stages of a role, as `pipeline.run` takes it.

  Args:
    role: what they do.
    bias_LE: float32 routing bias.
    counts: of the whole batch.
    no_stats: from `_no_stats`.
    stages: which layers they have.
    config: of the whole run.
  """
  no_layers = transformer.abstract_params(config)['layers']
  routed_L = losses.routed_of_routers(counts, config)

  def forward(weights, x_BSD, batch, stage):
    shared, layers = weights
    model = transformer.build(config, {**shared, 'layers': no_layers}, bias_LE)
    view, segment_BS = losses.targets(batch, 0), batch['segment_BS'][:, :-1]
    if role.first:
      x_BSD = transformer.embed(model, view.input_BS, segment_BS, config)
    loss = aux = z = jnp.zeros(())
    nats, router = jnp.zeros(1 + config.model.mtp_depth), no_stats
    if role.layers:
      row_l = jnp.asarray(stages.rows_of_stage)[stage, : role.layers]
      x_BSD, stats = _layers(role, layers, x_BSD, segment_BS, view.mask_BS, bias_LE[row_l], config)
      aux, z = auxiliary(stats, routed_L[row_l], jnp.zeros_like(stats.load_E), config)
      router = jax.tree.map(lambda rows, a: rows.at[row_l].set(a), router, vary(stats, VARYING))
    if role.last:
      nats, of_mtp, _ = losses.predict(model, x_BSD, batch, config)
      loss = losses.of_predictions(nats, counts, config)
      if of_mtp is not None:
        moe = config.model.num_moe_layers
        more_aux, more_z = auxiliary(of_mtp, routed_L[moe:], jnp.zeros_like(of_mtp.load_E), config)
        aux, z = aux + more_aux, z + more_z
        router = jax.tree.map(lambda rows, a: rows.at[moe:].set(a), router, vary(of_mtp, VARYING))
    sums = losses.Sums(nats, aux, z, router)
    return vary((x_BSD, loss + aux + z), VARYING), jax.tree.map(lax.stop_gradient, vary(sums, VARYING))

  return forward


def _layers(role: Role, layers, x_BSD, segment_BS, mask_BS, bias_lE, config: Resolved):
  """A stage's MoE layers, and their statistics stacked.

  Args:
    role: how many there are; the rest of `layers` is of larger stages.
    layers: a list of single layers' weights, or stacked ones, which are scanned.
    x_BSD, segment_BS, mask_BS: as of `transformer.stack`.
    bias_lE: routing bias of the stage's layers.
    config: of the layers, and train.remat.
  """

  def layer(x_BSD, of_layer):
    weights, bias_E = of_layer
    return transformer.moe_layer(config, weights)(x_BSD, segment_BS, mask_BS, bias_E, config)

  layer = transformer.remat(layer, config.train.remat)
  if not isinstance(layers, list):
    layers = jax.tree.map(lambda a: a[: role.layers], layers)
    return lax.scan(layer, x_BSD, (layers, bias_lE), unroll=config.train.unroll_layers)
  found: list[RouterStats] = []
  for weights, bias_E in zip(layers[: role.layers], bias_lE, strict=True):
    x_BSD, stats = layer(x_BSD, (weights, bias_E))
    found.append(stats)
  return x_BSD, stack_stats(found)


def _no_stats(layers, x_BSD, segment_BS, config: Resolved) -> RouterStats:
  """Zeros, a row per router of the model."""
  one = layers[0] if isinstance(layers, list) else jax.tree.map(lambda a: a[0], layers)
  bias_E, mask_BS = jnp.zeros(config.model.num_experts), segment_BS > 0
  stats = jax.eval_shape(
    lambda w, x: transformer.moe_layer(config, w)(x, segment_BS, mask_BS, bias_E, config)[1], one, x_BSD
  )
  return jax.tree.map(lambda a: vary(jnp.zeros((config.model.num_routers, *a.shape), a.dtype), VARYING), stats)
