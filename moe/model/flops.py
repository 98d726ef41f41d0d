"""How many FLOPs training a token takes by the model alone, and how many a device can do: MFU is their ratio."""

import re

import jax

from moe.config import Config
from moe.model import transformer
from moe.registry import ATTENTIONS

# Dense bf16 products with float32 sums, by what jax calls the device; data sheets, without sparsity.
PEAK_BF16_FLOPS_PER_S = {
  'H100': 989e12,
  'H100 PCIe': 756e12,
  'H100 NVL': 835e12,
  'H200': 989e12,
  'H800': 989e12,
  'H20': 148e12,
  'A100': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
}


def peak_bf16_flops_per_s(device_kind: str) -> float | None:
  """The peak of one device by its `jax.Device.device_kind`; None if it is not known, as for CPUs."""
  known = [name for name in PEAK_BF16_FLOPS_PER_S if re.search(rf'\b{name}\b', device_kind)]
  return PEAK_BF16_FLOPS_PER_S[max(known, key=len)] if known else None


def matmul_flops_per_token(config: Config) -> float:
  """FLOPs of the matrix products in training, forward and backward, per predicted token.

  6 for each weight that a token is multiplied with, plus attention's two products, causal, so half of S on average:

      6 * weights + 3 * layers * 2 * H * (query-key dim + value dim) * S / 2

  Weights are attention's projections, dense feed-forwards, shared experts, top_k of the routed ones, routers, the head
  (vocabulary unpadded) and, per MTP module, its projection, its layer and one more pass of the head. The embedding
  lookup multiplies nothing, and what is recomputed in the backward pass is not counted.
  """
  model, weights = config.model, 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(transformer.abstract_params(config))[0]:
    name = path[-1].key
    axes = name.rsplit('_', 1)[-1]
    if name.startswith('w_') and 'V' not in axes:
      weights += leaf.size * model.top_k // model.num_experts if 'e' in axes else leaf.size
  weights += (1 + model.mtp_depth) * model.d_model * model.vocab_size
  products = ATTENTIONS[model.attention].score_flops(model, config.data.seq_len)
  return 6.0 * weights + 3 * (model.num_layers + model.mtp_depth) * products
