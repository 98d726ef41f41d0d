"""Cross-entropy + MTP + balance terms for one microbatch of one shard, as sums (see `Sums`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.losses import auxiliary
from moe.balance.stats import RouterStats
from moe.model import transformer
from moe.model.layer import stack_stats
from moe.model.transformer import Transformer
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved


class Targets(NamedTuple):
  """One prediction distance: inputs at S positions, what they predict, and which positions count.

  Distance 0 is the main model (predicts the next token), distance k the MTP module k.
  """

  input_BS: jax.Array  # token k ahead
  target_BS: jax.Array  # token k + 1 ahead
  mask_BS: jax.Array  # input is a token of the same document: routed and counted in loads
  weight_BS: jax.Array  # so is the target: counted in the loss


class Counts(NamedTuple):
  """float32 numbers of positions over the whole batch (mesh and microbatches), one per distance 0..mtp_depth."""

  routed: jax.Array
  predicted: jax.Array


class Sums(NamedTuple):
  """What a microbatch adds to the step's statistics; all are sums over positions of this shard.

  nats: cross-entropy per distance, [1 + mtp_depth]. aux, z: weighted balance losses, already divided by the batch's
  token count. router: RouterStats with a row per router.
  """

  nats: jax.Array
  aux: jax.Array
  z: jax.Array
  router: RouterStats


def targets(batch: dict, distance: int) -> Targets:
  """Inputs and targets of one distance from token_BS and segment_BS, both [B, S + 1]."""
  S = batch['token_BS'].shape[1] - 1
  segment_BS = batch['segment_BS'][:, :S]

  def ahead(key, by):
    return jnp.pad(batch[key][:, by : by + S], ((0, 0), (0, max(0, by - 1))))

  def inside(by):
    return (segment_BS > 0) & (ahead('segment_BS', by) == segment_BS)

  return Targets(ahead('token_BS', distance), ahead('token_BS', distance + 1), inside(distance), inside(distance + 1))


def count_positions(batch: dict, mtp_depth: int) -> Counts:
  """Counts over this shard's rows; sum them over mesh and microbatches."""
  views = [targets(batch, distance) for distance in range(mtp_depth + 1)]
  routed = jnp.stack([view.mask_BS.sum() for view in views])
  return Counts(routed.astype(jnp.float32), jnp.stack([view.weight_BS.sum() for view in views]).astype(jnp.float32))


def count_batch(batch: dict, mtp_depth: int) -> Counts:
  """Counts over mesh and microbatches of a batch [M, B, S + 1]."""
  counts = jax.vmap(lambda micro: count_positions(micro, mtp_depth))(batch)
  return sum_over_mesh(jax.tree.map(lambda count: count.sum(0), counts))


class Forward(NamedTuple):
  """What a forward pass finds on this shard.

  nats: summed cross-entropy per distance, [1 + mtp_depth]. router: RouterStats with a row per router, and in them, if
  config.each_token, what each token was given. nats_BS: then also the next token's cross-entropy, 0 where
  it does not count; else ().
  """

  nats: jax.Array
  router: RouterStats
  nats_BS: jax.Array | tuple


class Predicted(NamedTuple):
  """What comes after the MoE layers: nats and nats_BS as of `Forward`; mtp: statistics of the MTP modules' routers."""

  nats: jax.Array
  mtp: RouterStats | None
  nats_BS: jax.Array | tuple


def forward(model: Transformer, batch: dict, config: Resolved) -> Forward:
  """Cross-entropy of every distance and router statistics."""
  segment_BS = batch['segment_BS'][:, :-1]
  main = targets(batch, 0)
  x_BSD = transformer.embed(model, main.input_BS, segment_BS, config)
  h_BSD, stats = transformer.stack(model, x_BSD, segment_BS, main.mask_BS, config)
  nats, of_mtp, nats_BS = predict(model, h_BSD, batch, config)
  if of_mtp is not None:
    stats = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stats, of_mtp)
  return Forward(nats, stats, nats_BS)


def predict(model: Transformer, h_BSD: jax.Array, batch: dict, config: Resolved) -> Predicted:
  """What comes after the MoE layers: the head, and the MTP modules.

  Args:
    model: parameters as this shard computes with them.
    h_BSD: hidden states, before the final norm.
    batch: token_BS, segment_BS [B, S + 1].
    config: of the modules, and each_token.
  """
  segment_BS, main = batch['segment_BS'][:, :-1], targets(batch, 0)
  predicted = model, h_BSD, model.scale_out_D[...], main.target_BS, main.weight_BS
  nats_BS: jax.Array | tuple = ()
  if config.each_token:
    first, each_BS = transformer.nats_of_each(*predicted)
    nats_BS = jnp.where(main.weight_BS, each_BS, 0)
  else:
    first = transformer.nats(*predicted)
  nats, stats = [first], []
  for depth in range(config.model.mtp_depth):
    view = targets(batch, depth + 1)
    h_BSD, one = transformer.mtp_hidden(model, depth, h_BSD, view.input_BS, segment_BS, view.mask_BS, config)
    stats.append(one)
    nats.append(transformer.nats(model, h_BSD, model.mtp[depth].scale_out_D[...], view.target_BS, view.weight_BS))
  return Predicted(jnp.stack(nats), stack_stats(stats) if stats else None, nats_BS)


def loss(
  model: Transformer, batch: dict, counts: Counts, earlier_load_LE: jax.Array, config: Resolved
) -> tuple[jax.Array, Sums]:
  """This shard's and microbatch's part of the training loss: summed over mesh and microbatches it is the loss.

  Cross-entropy (`of_predictions`) + auxiliary loss + z-loss.

  Args:
    model: parameters as this shard computes with them.
    batch: token_BS, segment_BS [B, S + 1].
    counts: positions of the whole batch.
    earlier_load_LE: loads of the step's earlier microbatches on this shard.
    config: mtp_weight, the balance losses' weights and scope, and the model.
  """
  nats, stats, _ = forward(model, batch, config)
  aux, z = auxiliary(stats, routed_of_routers(counts, config), earlier_load_LE, config)
  return of_predictions(nats, counts, config) + aux + z, jax.tree.map(lax.stop_gradient, Sums(nats, aux, z, stats))


def of_predictions(nats: jax.Array, counts: Counts, config: Resolved) -> jax.Array:
  """CE mean + mtp_weight / depth * sum of the MTP means (arXiv 2412.19437, equation 25)."""
  means, depth = nats / jnp.maximum(counts.predicted, 1), config.model.mtp_depth
  return means[0] + (config.train.mtp_weight / depth * means[1:].sum() if depth else 0.0)


def routed_of_routers(counts: Counts, config: Resolved) -> jax.Array:
  """float32 [num_routers], tokens of the whole batch that each is asked about; 1 where there are none."""
  routed = jnp.maximum(counts.routed, 1)
  return jnp.concatenate([jnp.broadcast_to(routed[:1], (config.model.num_moe_layers,)), routed[1:]])


def sum_over_mesh(tree):
  """Sums over all batch shards."""
  return jax.tree.map(lambda leaf: lax.psum(leaf, BATCH_AXES), tree)
