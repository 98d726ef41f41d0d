"""How unequal expert loads are, in numpy on the host.

`load_LE` counts the token copies that each layer's router sent to each expert, over a batch or over a data set. Every
metric is a float64 [L]; a layer without any load counts as balanced.

A function under `@metric(...)` is in the logs, the console and the report of every run: its mean over layers is called
NAME_batch in metrics.jsonl and NAME_global in evals.jsonl. Nothing else need be changed (docs/howto/metric.md).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moe.errors import UserError, short
from moe.plugins import Registry


@dataclasses.dataclass(frozen=True)
class Metric:
  """A measure of a router's counts."""

  of: Callable[[np.ndarray], np.ndarray]  # load_LE, int64 [L, E] -> [L]
  title: str  # for people, in the report
  shown: bool  # also on the line that the console has of each evaluation


# What else rows of metrics.jsonl and of evals.jsonl have: a metric of such a name would be taken for it.
LOGGED = (
  *('step', 'loss', 'total_loss', 'mtp_loss', 'aux_loss', 'z_loss', 'drop_rate', 'gate_entropy', 'bias_min'),
  *('bias_max', 'grad_norm', 'learning_rate', 'gamma', 'tokens', 'tokens_per_s', 'step_s', 'model_tflop_per_s', 'mfu'),
  *('set', 'sample', 'val_loss', 'val_perplexity', 'val_bits_per_byte', 'val_mtp_loss', 'val_tokens', 'val_bytes'),
  *('specialisation_bits', 'source_loss', 'source_tokens'),
)
METRICS = Registry('metric', 'moe.balance.metrics.Metric', taken=LOGGED)


def metric(title: str, name: str = '', shown: bool = True) -> Callable:
  """Registers a function of load_LE, which stays as it is, as the metric `name`, or by the function's own name.

  Raises:
    ValueError: it stands without brackets, so that the function came for the title.
  """
  if not isinstance(title, str):
    raise ValueError(f"@metric needs a title in brackets, such as @metric('load CV'), not {short(title)}")

  def register(function):
    METRICS.add(name or function.__name__, Metric(function, title, shown))
    return function

  return register


def measured(load_LE, of: str) -> dict[str, float]:
  """Every metric's mean over layers, as NAME_batch or NAME_global.

  Args:
    load_LE: counts, [L, E].
    of: 'batch' or 'global'.

  Raises:
    UserError: a metric does not give a finite number per layer.
  """
  return {f'{name}_{of}': float(per_layer(name, load_LE).mean()) for name in METRICS}


def per_layer(name: str, load_LE) -> np.ndarray:
  """Metric `name` of each layer, float64 [L]. Raises UserError as `measured`."""
  load_LE = np.asarray(load_LE)
  found = METRICS[name].of(load_LE)
  try:
    value_L = np.asarray(found, np.float64)
  except (TypeError, ValueError):
    value_L = np.array(np.nan)
  if value_L.shape != load_LE.shape[:1] or not np.isfinite(value_L).all():
    raise UserError(
      f'{METRICS.title(name)} must give a finite number for each of {len(load_LE)} layers, not {short(found)}'
    )
  return value_L


@metric('MaxVio')
def max_vio(load_LE) -> np.ndarray:
  """Maximal violation of each layer, (max_i load_i - mean) / mean (arXiv 2408.15664, equation 4).

  Args:
    load_LE: counts, [L, E].

  Returns:
    [L], 0 (balanced) to E - 1 (one expert takes everything).
  """
  return _share(load_LE).max(-1) - 1


@metric('load CV', shown=False)
def cv(load_LE) -> np.ndarray:
  """Coefficient of variation of each layer, the population standard deviation over experts / mean.

  Args:
    load_LE: counts, [L, E].

  Returns:
    [L], 0 (balanced) to sqrt(E - 1).
  """
  return _share(load_LE).std(-1)


@metric('load entropy', 'load_entropy', shown=False)
def entropy(load_LE) -> np.ndarray:
  """Normalised load entropy of each layer, -sum_i p_i ln p_i / ln E with p_i the share of expert i.

  Args:
    load_LE: counts, [L, E].

  Returns:
    [L], 0 (one expert takes everything) to 1 (balanced).
  """
  share_LE = _share(load_LE)
  num_experts = share_LE.shape[-1]
  if num_experts == 1:
    return np.ones(share_LE.shape[:-1])
  p_LE = share_LE / num_experts
  nats_L = -(p_LE * np.log(np.where(p_LE > 0, p_LE, 1))).sum(-1)
  return np.clip(nats_L / np.log(num_experts), 0, 1)


@metric('load Gini', shown=False)
def gini(load_LE) -> np.ndarray:
  """Gini coefficient of each layer, sum_i (2i - E - 1) load_(i) / (E sum_i load_i) over the ascending loads.

  Args:
    load_LE: counts, [L, E].

  Returns:
    [L], 0 (balanced) to 1 - 1/E (one expert takes everything).
  """
  share_LE = np.sort(_share(load_LE), -1)
  num_experts = share_LE.shape[-1]
  rank_E = np.arange(1, num_experts + 1)
  return ((2 * rank_E - num_experts - 1) * share_LE).sum(-1) / num_experts**2


@metric('dead experts', shown=False)
def dead_experts(load_LE) -> np.ndarray:
  """Experts of each layer that no token was sent to.

  Args:
    load_LE: counts, [L, E].

  Returns:
    [L], 0 to E; 0 in a layer without any load.
  """
  load_LE = np.asarray(load_LE)
  return ((load_LE == 0) & (load_LE.sum(-1, keepdims=True) > 0)).sum(-1).astype(np.float64)


def device_imbalance(load_LE, num_devices: int) -> np.ndarray:
  """Load of the busiest device / mean load of a device, with the experts split over devices in contiguous runs.

  Args:
    load_LE: counts, [L, E].
    num_devices: devices that the experts are spread over; divides E.

  Returns:
    [L], 1 (balanced) to num_devices.

  Raises:
    ValueError: num_devices does not divide E.
  """
  load_LE = np.asarray(load_LE, np.float64)
  num_experts = load_LE.shape[-1]
  if num_devices < 1 or num_experts % num_devices:
    raise ValueError(f'{num_experts} experts cannot be split evenly over num_devices = {num_devices}')
  per_device = load_LE.reshape(*load_LE.shape[:-1], num_devices, -1).sum(-1)
  return _share(per_device).max(-1)


def noise_floor(tokens: int, num_experts: int, top_k: int, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
  """What a perfectly balanced random router scores: no finite sample of tokens is spread evenly.

  The router picks K distinct experts per token, uniformly. An expert's load is then binomial with p = K / E, so its
  variance is T p (1 - p); since the loads sum to T K, two experts' covariance is -variance / (E - 1). The loads are
  drawn from the Gaussian with these moments, which is close once an expert's expected load T p is some tens.

  Args:
    tokens: T, tokens that are routed.
    num_experts: E.
    top_k: K, experts per token.
    samples: simulated routings.
    seed: of the simulation.

  Returns:
    (expected max_vio, expected cv). The second is about sqrt((1 - K/E) / (T K/E)).

  Raises:
    ValueError: tokens < 1, or top_k outside 1..num_experts.
  """
  if tokens < 1 or not 1 <= top_k <= num_experts:
    raise ValueError(f'no routing of {tokens} tokens to {top_k} of {num_experts} experts')
  p = top_k / num_experts
  noise = np.random.default_rng(seed).standard_normal((samples, num_experts))
  noise -= noise.mean(-1, keepdims=True)  # covariance of the columns: 1 - 1/E on the diagonal, -1/E off it
  scale = np.sqrt(tokens * p * (1 - p) * num_experts / max(num_experts - 1, 1))
  deviation = noise * scale / (tokens * p)  # (load - mean) / mean
  return float(deviation.max(-1).mean()), float(deviation.std(-1).mean())


def _share(load_LE):
  """load / mean load of the layer; 1 everywhere in a layer without load."""
  load_LE = np.asarray(load_LE, np.float64)
  mean_L = load_LE.mean(-1, keepdims=True)
  return np.where(mean_L > 0, load_LE / np.where(mean_L > 0, mean_L, 1), 1)
