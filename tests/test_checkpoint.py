"""What a checkpoint gives back; tests/test_train.py has interruption, damage and full disks."""

import dataclasses

import jax
import numpy as np

from moe import state
from moe.checkpoint import Checkpoints, abstract_like
from moe.config import BalanceConfig, Config, ModelConfig


def test_weights_of_a_run_with_another_bias_rule(tmp_path, mesh_of):
  """SMEBU keeps a momentum beside the bias: a run that starts from such weights, or an evaluation, wants none of it."""
  model = ModelConfig(vocab_size=40, d_model=16, num_layers=2, d_ff=16, d_expert=8, num_experts=4, top_k=2)
  config, mesh = Config(model=model, balance=BalanceConfig(bias_rule='smebu')), mesh_of(expert=2)
  saved = state.create(config, mesh)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(saved, {'step': 3, 'tokens': 7})
  checkpoints.wait()
  other = dataclasses.replace(config, balance=BalanceConfig(bias_rule='sign'))
  weights = checkpoints.restore_weights(state.create(other, mesh))
  assert list(weights.balance) == ['bias_LE']
  for got, want in zip(jax.tree.leaves(weights.params), jax.tree.leaves(saved.params), strict=True):
    np.testing.assert_array_equal(got, want)
  whole, meta = checkpoints.restore(3, abstract_like(state.abstract(config), state.shardings(config, mesh)))
  checkpoints.close()
  assert meta['tokens'] == 7
  for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(saved), strict=True):
    np.testing.assert_array_equal(got, want)
    assert got.sharding == want.sharding
