"""FLOPs of a token against closed forms, and the peaks of devices by what jax calls them."""

import dataclasses

import pytest

from configs import h200
from moe.config import Config, DataConfig, ModelConfig, from_config_dict
from moe.model import flops


def by_hand(c: ModelConfig, S: int) -> int:
  """Multiplications and additions of one token's forward pass at the mean causal length S / 2, times three."""
  heads, qk = c.num_heads, c.qk_nope_dim + c.qk_rope_dim
  if c.attention == 'mha':
    project = c.d_model * heads * (2 * qk + c.v_dim)
  else:
    query = (c.d_model + heads * qk) * c.q_lora_rank if c.q_lora_rank else c.d_model * heads * qk
    project = query + c.d_model * (c.kv_lora_rank + c.qk_rope_dim) + c.kv_lora_rank * heads * (c.qk_nope_dim + c.v_dim)
  attend = project + heads * c.v_dim * c.d_model + heads * qk * S / 2 + heads * c.v_dim * S / 2
  dense = 3 * c.d_model * c.d_ff
  moe = c.d_model * c.num_experts + 3 * c.d_model * c.d_expert * (c.top_k + c.num_shared_experts)
  head = c.d_model * c.vocab_size
  layers = c.num_layers * attend + c.num_dense_layers * dense + (c.num_layers - c.num_dense_layers) * moe
  module = 2 * c.d_model * c.d_model + attend + moe + head
  return 3 * 2 * (layers + head + c.mtp_depth * module)


def test_tiny_models_with_everything(tiny_model):
  mha = dataclasses.replace(tiny_model, attention='mha', qk_nope_dim=0, q_lora_rank=0, tie_embeddings=True)
  direct = dataclasses.replace(tiny_model, q_lora_rank=0, mtp_depth=0, num_shared_experts=2)
  alone = dataclasses.replace(tiny_model, num_shared_experts=0, num_dense_layers=0)
  for model in (tiny_model, mha, direct, alone):
    config = Config(model=model, data=DataConfig(seq_len=20))
    assert flops.matmul_flops_per_token(config) == by_hand(model, 20)


def test_the_model_that_peers_were_measured_at():
  config = from_config_dict(h200.get_config())
  assert flops.matmul_flops_per_token(config) == by_hand(config.model, 2048)
  assert flops.matmul_flops_per_token(config) == pytest.approx(4.99e9, rel=1e-3)


@pytest.mark.parametrize(
  ('device_kind', 'peak'),
  [
    ('NVIDIA H200', 989e12),
    ('NVIDIA H20', 148e12),
    ('NVIDIA H20-3e', 148e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H800', 989e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('cpu', None),
    ('NVIDIA A10', None),
    ('Graphics of tomorrow', None),
  ],
)
def test_peaks_by_device_kind(device_kind, peak):
  assert flops.peak_bf16_flops_per_s(device_kind) == peak
