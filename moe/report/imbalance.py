"""What imbalance costs: a model of the step time on a mesh that spreads the experts over devices, from recorded loads.

Every device waits for the slowest one in each layer. With experts in contiguous runs over N devices, and tokens split
evenly between them, a step takes

    (all other FLOPs) / (N * rate) + sum over layers of max over devices (copies) * (seconds per copy)

where a copy, one token at one of its K experts, costs 18 D F FLOPs forward and backward (three matrices) and four ways
over the link of its device, 8 D bytes in bf16: its row in and its output home, then the gradients of both. Copies
beyond the capacity of an expert are dropped and cost nothing. Left out: overlap of computing and sending, the latency
of an exchange, the efficiency of small groups, and that each microbatch has a slowest device of its own.
"""

import math

import numpy as np

from moe.balance.metrics import device_imbalance
from moe.report.run import TAIL_FRACTION, Run

FLOPS_PER_S = 350e12  # of one device: what a bf16 step of configs/h200.py reaches on an H200
LINK_BYTES_PER_S = 450e9  # of one device: NVLink of an H200, one direction


def device_counts(num_experts: int) -> list[int]:
  """The three largest powers of two, from 2 on, that divide the experts; fewer if there are not so many."""
  powers = [2**i for i in range(1, num_experts.bit_length()) if num_experts % 2**i == 0]
  return powers[-3:]


def relative_throughput(run: Run, devices: int) -> float | None:
  """Modelled tokens/s with the loads of the run's last 10% of logged steps / tokens/s with perfectly even loads.

  Args:
    run: with load_history.jsonl, and model_tflop_per_s in its rows; else the result is None.
    devices: N, divides the number of experts.

  Returns:
    Above 0; 1 is perfect balance, more is possible only where dropping saves work.
  """
  (_, tflop_per_s), (_, tokens_per_s) = run.series('model_tflop_per_s'), run.series('tokens_per_s')
  if not run.load_history or not len(tflop_per_s):
    return None
  flops_per_token = 1e12 * float(np.median(tflop_per_s)) / float(np.median(tokens_per_s))
  tail = run.load_history[-math.ceil(TAIL_FRACTION * len(run.load_history)) :]
  settings = [run.setting(f'model.{key}') for key in ('d_model', 'd_expert', 'top_k', 'capacity_factor')]
  times = [step_s(row['load_LE'], devices, flops_per_token, *settings) for row in tail]
  real_s, even_s = np.sum(times, 0)
  return float(even_s / real_s)


def step_s(
  load_LE: np.ndarray,
  devices: int,
  flops_per_token: float,
  d_model: int,
  d_expert: int,
  top_k: int,
  capacity_factor: float = 0.0,
) -> tuple[float, float]:
  """Modelled seconds of one step with these loads, and with the same number of copies spread evenly.

  Args:
    load_LE: copies of the whole batch per layer and expert, before dropping.
    devices: that experts and tokens are divided over.
    flops_per_token: of the whole model, forward and backward, matrix products alone.
    d_model, d_expert: width of the model, and hidden width of an expert.
    top_k: experts per token.
    capacity_factor: an expert keeps at most so many times the mean load; 0: all.
  """
  copies_L = load_LE.sum(-1)
  expert_flops, expert_bytes = 18 * d_model * d_expert, 8 * d_model * (devices - 1) / devices
  copy_s = expert_flops / FLOPS_PER_S + expert_bytes / LINK_BYTES_PER_S
  other_flops = flops_per_token * copies_L.max() / top_k - expert_flops * copies_L.sum()
  other_s = max(other_flops, 0.0) / devices / FLOPS_PER_S
  limit_L = capacity_factor * copies_L / load_LE.shape[-1] if capacity_factor else copies_L
  kept_LE = np.minimum(load_LE, limit_L[:, None])
  busiest_L = kept_LE.sum(-1) / devices * device_imbalance(kept_LE, devices)
  return other_s + float(busiest_L.sum()) * copy_s, other_s + float(copies_L.sum()) / devices * copy_s
