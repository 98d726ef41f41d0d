"""The whole model against the oracle, causality through every part of it, and the vocabulary's corner cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from heads import head
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.config import BalanceConfig, ModelConfig, TrainConfig, from_config_dict
from moe.model import transformer
from moe.ops import norm
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved
from moe.train import loss as losses

B, S = 2, 8


def resolved(model, **changes):
  return Resolved(model=model, dispatch='local', grouped_matmul='ragged_dot', **changes)


def random_parameters(config, seed=0, std=0.5):
  """Parameters large enough for every part to matter, norms' scales and router bias included."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    value = std * rng.normal(size=leaf.shape)
    return (1 + value if path[-1].key.startswith('scale') else value).astype(np.float32)

  params = jax.tree.map_with_path(draw, transformer.abstract_params(config))
  bias_LE = rng.normal(size=(config.model.num_routers, config.model.num_experts)) / 5
  return params, bias_LE.astype(np.float32)


def random_batch(model, seed=0):
  rng = np.random.default_rng(seed)
  token_BS = rng.integers(0, model.vocab_size, (B, S + 1)).astype(np.int32)
  # A document per sequence would hide most mistakes: two and padding, and one that starts just before the end.
  segment_BS = np.array([[1, 1, 1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3, 4, 4]], np.int32)
  return {'token_BS': token_BS, 'segment_BS': segment_BS}


# ------------------------------------------------------------------------------------------------------- whole model

BALANCE = BalanceConfig(aux_loss='sequence', aux_alpha=0.7, z_loss=0.05)


@pytest.fixture(scope='module')
def whole(mesh_of, tiny_model):
  """One training loss of the tiny model: config, arguments, and (total, Sums, Counts), gradients."""
  config = resolved(tiny_model, balance=BALANCE, train=TrainConfig(mtp_weight=0.4))
  (params, bias_LE), batch = random_parameters(config), random_batch(tiny_model)

  def run(params, bias_LE, batch):
    counts = losses.sum_over_mesh(losses.count_positions(batch, tiny_model.mtp_depth))

    def total(params):
      model = transformer.build(config, params, bias_LE)
      none = lax.pcast(jnp.zeros(bias_LE.shape, jnp.int32), BATCH_AXES, to='varying')
      value, sums = losses.loss(model, batch, counts, none, config)
      return value, (value, sums)

    gradients, sums = jax.grad(total, has_aux=True)(params)
    return *losses.sum_over_mesh(sums), counts, gradients

  specs = (P(), P(), P(BATCH_AXES))
  mapped = jax.shard_map(run, mesh=mesh_of(), in_specs=specs, out_specs=P())
  mapped = jax.jit(mapped)
  return config, (params, bias_LE, batch), mapped(params, bias_LE, batch)


def expected_total(config, params, bias_LE, batch):
  """Total loss and its parts by the oracle."""
  model = config.model
  nats, predicted, routings, routed = oracle.model_forward(params, bias_LE, *batch.values(), model)
  aux = z = 0.0
  for routing, mask_BS in zip(routings, routed, strict=True):
    aux += oracle.sequence_loss(routing.scores_TE.reshape(B, S, -1), mask_BS, model.top_k)
    z += np.mean(oracle.log_sum_exp(routing.logits_TE)[mask_BS.reshape(-1)] ** 2)
  aux, z = config.balance.aux_alpha * aux, config.balance.z_loss * z
  means = nats / predicted
  return means[0] + config.train.mtp_weight * means[1:].mean() + aux + z, nats, predicted, routings, routed, aux, z


def test_whole_model_equals_oracle(whole):
  config, (params, bias_LE, batch), (total, sums, counts, _) = whole
  expected = expected_total(config, oracle.float64(params), oracle.float64(bias_LE), batch)
  expected_sum, nats, predicted, routings, routed, aux, z = expected
  np.testing.assert_array_equal(counts.predicted, predicted)
  np.testing.assert_array_equal(counts.routed, [routed[0].sum(), *(mask.sum() for mask in routed[2:])])
  np.testing.assert_array_equal(sums.router.load_E, [routing.load_E for routing in routings])
  np.testing.assert_array_equal(sums.router.dropped, 0)
  np.testing.assert_allclose(sums.nats, nats, rtol=1e-5)
  np.testing.assert_allclose([sums.aux, sums.z, total], [aux, z, expected_sum], rtol=1e-5)


def test_whole_model_gradients(whole):
  """Along a random direction of each module's parameters."""
  config, (params, bias_LE, batch), (*_, gradients) = whole
  params, bias_LE = oracle.float64(params), oracle.float64(bias_LE)
  paths, tree = jax.tree_util.tree_flatten_with_path(jax.tree.map(np.asarray, gradients))
  rng, step = np.random.default_rng(1), 1e-6
  for module in sorted({jax.tree_util.keystr(path[:-1]) for path, _ in paths}):
    inside = [jax.tree_util.keystr(path[:-1]) == module for path, _ in paths]
    # Of the length of its gradient, so that a large part of the module cannot hide a small one.
    draw = lambda gradient: rng.normal(size=gradient.shape) / np.linalg.norm(gradient)
    directions = [
      draw(gradient) if i else np.zeros(gradient.shape) for i, (_, gradient) in zip(inside, paths, strict=True)
    ]

    def value(sign, directions=directions):
      moved = jax.tree.map(lambda w, d: w + sign * step * d, params, jax.tree.unflatten(tree, directions))
      return expected_total(config, moved, bias_LE, batch)[0]

    parts = [(g * direction).sum() for (_, g), direction in zip(paths, directions, strict=True)]
    expected = (value(1) - value(-1)) / (2 * step)
    np.testing.assert_allclose(sum(parts), expected, rtol=0, atol=1e-4, err_msg=module)


# ---------------------------------------------------------------------------------------------------------- causality


def test_logits_depend_on_earlier_positions_of_the_document_only(mesh_of, tiny_model):
  """Embeddings -> dense layer -> MoE layer with its router -> logits: exactly zero gradient from anywhere else."""
  model = dataclasses.replace(tiny_model, num_layers=2, mtp_depth=0, q_lora_rank=0)
  config = resolved(model)
  params, bias_LE = random_parameters(config)
  segment_BS = random_batch(model)['segment_BS'][:, :-1]
  rng = np.random.default_rng(2)
  x_BSD = rng.normal(size=(B, S, model.d_model)).astype(np.float32)
  cotangent_BSV = rng.normal(size=(B, S, model.padded_vocab)).astype(np.float32)

  def run(params, bias_LE, x_BSD, cotangent_BSV):
    built = transformer.build(config, params, bias_LE)

    def logits(x_BSD):
      segments = jnp.asarray(segment_BS)
      for layer in built.dense_layers:
        x_BSD = layer(x_BSD, segments, config)
      h_BSD, _ = transformer.stack(built, x_BSD, segments, segments > 0, config)
      return head(built, h_BSD, built.scale_out_D[...])

    return jax.vjp(logits, x_BSD)[1](cotangent_BSV)[0]

  specs = (P(), P(), P(), P(None, None, 'tensor'))
  mapped = jax.shard_map(run, mesh=mesh_of(), in_specs=specs, out_specs=P())
  mapped = jax.jit(mapped)
  for b in range(B):
    for position in range(S):
      only = np.zeros_like(cotangent_BSV)
      only[b, position] = cotangent_BSV[b, position]
      seen_BS = np.abs(mapped(params, bias_LE, x_BSD, only)).max(-1) > 0
      expected_BS = np.zeros((B, S), bool)
      expected_BS[b, : position + 1] = segment_BS[b, : position + 1] == segment_BS[b, position]
      np.testing.assert_array_equal(seen_BS, expected_BS)


# --------------------------------------------------------------------------------------------------------- vocabulary

VOCAB = ModelConfig(vocab_size=200, d_model=8, num_layers=1, num_dense_layers=0, mtp_depth=0)  # padded to 256


@pytest.mark.parametrize('tensor', [1, 2])
@pytest.mark.parametrize('tied', [False, True])
def test_vocabulary(tied, tensor, mesh_of):
  """Embedding, head and cross-entropy with the vocabulary padded, tied and sharded."""
  config = resolved(dataclasses.replace(VOCAB, tie_embeddings=tied))
  params, bias_LE = random_parameters(config)
  names = ['w_embedding_VD'] if tied else ['w_embedding_VD', 'w_head_DV']
  for name in names:  # a padded entry that was not masked would win everywhere
    padding = (slice(200, None),) if name.endswith('VD') else (slice(None), slice(200, None))
    params[name][padding] *= 50
  rng = np.random.default_rng(4)
  token_BS, target_BS = rng.integers(0, 200, (2, 2, 6))
  token_BS[0, :4], target_BS[0, :4] = [0, 127, 128, 199], [199, 128, 127, 0]  # both sides of every border
  h_BSD, weight_BS = rng.normal(size=(2, 6, 8)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)

  specs = jax.tree.map(lambda _: P(), params)
  specs |= {'w_embedding_VD': P('tensor', None)} | ({} if tied else {'w_head_DV': P(None, 'tensor')})

  def local(params, h_BSD):
    model = transformer.build(config, params, jnp.asarray(bias_LE))
    embedded_BSD = transformer.embed_tokens(model.w_embedding_VD[...], jnp.asarray(token_BS))
    logits_BSV = head(model, h_BSD, model.scale_out_D[...])
    nats = transformer.nats(model, h_BSD, model.scale_out_D[...], jnp.asarray(target_BS), jnp.asarray(weight_BS))
    return embedded_BSD, logits_BSV, nats

  out_specs = (P(), P(None, None, 'tensor'), P())
  mapped = jax.shard_map(local, mesh=mesh_of(tensor=tensor), in_specs=(specs, P()), out_specs=out_specs)

  def value(params, h_BSD):
    embedded_BSD, logits_BSV, nats = mapped(params, h_BSD)
    return nats + (embedded_BSD * h_BSD).sum(), (embedded_BSD, logits_BSV, nats)

  grad, (embedded_BSD, logits_BSV, nats) = jax.jit(jax.grad(value, has_aux=True))(params, h_BSD)

  w, h = oracle.float64(params), oracle.float64(h_BSD)
  logits = lambda w: oracle.logits(h, w['scale_out_D'], w, config.model)
  nats_BS = -np.take_along_axis(np.log(oracle.softmax(logits(w))), target_BS[..., None], -1)[..., 0]
  np.testing.assert_array_equal(embedded_BSD, params['w_embedding_VD'][token_BS])
  np.testing.assert_allclose(logits_BSV[..., :200], logits(w), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(jax.nn.softmax(logits_BSV)[..., 200:], 0)
  np.testing.assert_allclose(nats, (nats_BS * weight_BS).sum(), rtol=1e-5)

  # Gradients: of the loss through the head, and of the embedding through its lookup.
  expected_VD = np.zeros((256, 8))
  np.add.at(expected_VD, token_BS, h)
  dlogits = oracle.softmax(logits(w))
  np.put_along_axis(dlogits, target_BS[..., None], np.take_along_axis(dlogits, target_BS[..., None], -1) - 1, -1)
  normed = oracle.rms_norm(h, w['scale_out_D'], config.model.norm_eps)
  head_VD = np.zeros((256, 8))
  head_VD[:200] = np.einsum('bsv,bsd->vd', dlogits * weight_BS[..., None], normed)
  if tied:
    np.testing.assert_allclose(grad['w_embedding_VD'], expected_VD + head_VD, rtol=1e-4, atol=1e-5)
  else:
    np.testing.assert_allclose(grad['w_embedding_VD'], expected_VD, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad['w_head_DV'], head_VD.T, rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_has_a_finite_gradient_at_the_least_epsilon():
  config = from_config_dict({'model': {'norm_eps': 1e-20}})
  norm_of = lambda x: norm.rms_norm(x, jnp.ones(4), config.model.norm_eps).sum()
  for x_D in (jnp.zeros(4), jnp.full(4, 1e-15), jnp.full(4, 1e-30)):
    assert jnp.isfinite(jax.grad(norm_of)(x_D)).all()
