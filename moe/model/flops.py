"""How many FLOPs training a token takes by the model alone, and how many a device can do: MFU is their ratio."""

import re
from typing import NamedTuple

import jax

from moe.config import Config
from moe.model import transformer
from moe.parallel.schedule import Times
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
  model = config.model
  return 6.0 * sum(weights_of(config).values()) + 3 * (model.num_layers + model.mtp_depth) * _scores(config)


def weights_of(config: Config) -> dict[str, int]:
  """How many weights a token is multiplied with, see above: in 'dense_layers', 'layers' (MoE), 'head' and 'mtp'."""
  model = config.model
  head = model.d_model * model.vocab_size
  found = {'dense_layers': 0, 'layers': 0, 'head': head, 'mtp': model.mtp_depth * head}
  for path, leaf in jax.tree_util.tree_flatten_with_path(transformer.abstract_params(config))[0]:
    name = path[-1].key
    axes = name.rsplit('_', 1)[-1]
    if name.startswith('w_') and 'V' not in axes:
      found[path[0].key] += leaf.size * model.top_k // model.num_experts if 'e' in axes else leaf.size
  return found


def _scores(config: Config) -> float:
  """Forward FLOPs per token of attention's two products in a layer."""
  return ATTENTIONS[config.model.attention].score_flops(config.model, config.data.seq_len)


class StageWork(NamedTuple):
  """What a pipeline's stages have to do.

  first, last: forward FLOPs of the dense layers, and of head and MTP modules, in MoE layers. times: of a stage's
  operations, in its forward passes.
  """

  first: float
  last: float
  times: Times


def stage_work(config: Config) -> StageWork:
  """See `StageWork`. A weight's product has a gradient for each operand; attention's scores have no weights."""
  model, scores, weights = config.model, _scores(config), weights_of(config)
  layer = 2 * weights['layers'] / model.num_moe_layers + scores
  first = 2 * weights['dense_layers'] + model.num_dense_layers * scores
  last = 2 * (weights['head'] + weights['mtp']) + model.mtp_depth * scores
  share = scores / layer
  again = 1.0 if config.train.remat == 'full' else 0.0
  return StageWork(first / layer, last / layer, Times(1.0, 1.0 + share + again, 1.0 - share))
