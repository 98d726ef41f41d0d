"""Auxiliary losses are compared fairly: layers do not mix, and microbatches count by their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from moe.balance.losses import auxiliary
from moe.balance.stats import router_stats
from moe.config import BalanceConfig, ModelConfig
from moe.model.layer import stack_stats
from moe.model.router import route
from moe.parallel.resolved import Resolved
from moe.train import loss as losses

B, S, E, K, ALPHA = 4, 8, 6, 2, 0.3
MODEL = ModelConfig(num_experts=E, top_k=K)


def compiled(loss, tokens_L, mesh):
  """(router logits of every layer, mask) -> the auxiliary loss of one microbatch."""
  config = Resolved(model=MODEL, balance=BalanceConfig(bias_rule='none', aux_loss=loss, aux_alpha=ALPHA))

  def local(layers_LBSE, mask_BS):
    stats = []
    for logits_BSE in layers_LBSE:
      routing = route(logits_BSE.reshape(-1, E), jnp.eye(E), jnp.zeros(E), mask_BS.reshape(-1), MODEL)
      stats.append(router_stats(routing, jnp.zeros(E), mask_BS, config))
    return losses.sum_over_mesh(auxiliary(stack_stats(stats), tokens_L, jnp.zeros((2, E), jnp.int32), config)[0])

  rows = ('data', 'expert')
  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(None, rows), P(rows)), out_specs=P()))


@pytest.mark.parametrize('loss', ['switch', 'sequence'])
def test_layers_do_not_mix_and_microbatches_count_by_their_tokens(loss, mesh_of):
  rng = np.random.default_rng(0)
  layers_LBSE = (rng.normal(size=(2, B, S, E)) + np.linspace(-1, 1, E)).astype(np.float32)
  layers_LBSE[1] = layers_LBSE[1, ..., ::-1]  # pooled over layers, the loads would be even
  mask_BS = np.ones((B, S), bool)
  mask_BS[2:, 2:] = False  # the second microbatch has a quarter of the first's tokens
  tokens_L = np.full(2, mask_BS.sum(), np.float32)

  run = compiled(loss, tokens_L, mesh_of())
  microbatches = (slice(2), slice(2, 4))
  found = sum(float(run(layers_LBSE[:, part], mask_BS[part])) for part in microbatches)

  expected = 0.0
  for logits_BSE in oracle.float64(layers_LBSE):
    for part in microbatches:
      scores_BSE, mask = oracle.sigmoid(logits_BSE[part]), mask_BS[part]
      if loss == 'sequence':
        value = oracle.sequence_loss(scores_BSE, mask, K)
      else:
        flat = logits_BSE[part].reshape(-1, E)
        load_E = oracle.route(flat, np.eye(E), np.zeros(E), mask.reshape(-1), MODEL).load_E
        value = oracle.switch_loss(scores_BSE.reshape(-1, E), load_E, mask.reshape(-1))
      assert value > 1.05, 'each layer by itself is unbalanced'
      expected += ALPHA * value * mask.sum() / mask_BS.sum()
  assert found == pytest.approx(expected, rel=1e-5)
