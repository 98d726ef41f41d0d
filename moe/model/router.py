"""The router: which experts a token goes to, and with which weight (arXiv 2412.19437, section 2.1.2).

The bias decides who is selected and never enters a gate weight, so it has no gradient. Everything here is float32
with matmul precision HIGHEST: a rounding that differs between meshes would send tokens to other experts.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.routing import Routing, count
from moe.config import ModelConfig
from moe.ops.decode import routing_gpu
from moe.ops.varying import align


def route(
  x_TD: jax.Array,
  w_router_DE: jax.Array,
  bias_E: jax.Array,
  mask_T: jax.Array,
  config: ModelConfig,
  multiplicative: bool = False,
  dropless: bool = False,
) -> Routing:
  """Routes tokens.

  Args:
    x_TD: tokens.
    w_router_DE: router weights.
    bias_E: float32 routing bias, added to the scores for selection, or multiplied with them if `multiplicative`.
    mask_T: bool, False for padding, which is neither counted nor sent anywhere.
    config: num_experts, top_k, num_groups, top_groups, score_fn, normalize_gates, route_scale, capacity_factor.
    multiplicative: the bias is a factor (arXiv 2408.15664, table 4).
    dropless: ignore the capacity factor, as in evaluation and inference.
  """
  logits_TE = jnp.dot(x_TD.astype(jnp.float32), w_router_DE.astype(jnp.float32), precision=lax.Precision.HIGHEST)
  return route_logits(logits_TE, bias_E, mask_T, config, multiplicative, dropless)


def route_logits(
  logits_TE: jax.Array,
  bias_E: jax.Array,
  mask_T: jax.Array,
  config: ModelConfig,
  multiplicative: bool = False,
  dropless: bool = False,
) -> Routing:
  """`route` from float32 logits.

  Args:
    logits_TE: float32, of the router.
    bias_E, mask_T, config, multiplicative, dropless: as of `route`.
  """
  scores_TE = jax.nn.sigmoid(logits_TE) if config.score_fn == 'sigmoid' else jax.nn.softmax(logits_TE, -1)
  fixed_TE, bias_E = lax.stop_gradient(scores_TE), lax.stop_gradient(bias_E)
  biased_TE = fixed_TE * bias_E if multiplicative else fixed_TE + bias_E
  expert_TK = select(biased_TE, config)
  weight_TK = jnp.take_along_axis(scores_TE, expert_TK, axis=1)
  if config.normalize_gates:
    weight_TK = weight_TK / (weight_TK.sum(-1, keepdims=True) + 1e-20)
  weight_TK = weight_TK * config.route_scale
  keep_TK = jnp.broadcast_to(mask_T[:, None], expert_TK.shape)
  load_E = count(expert_TK, keep_TK, config.num_experts)
  if config.capacity_factor and not dropless:
    keep_TK = within_capacity(expert_TK, lax.stop_gradient(weight_TK), keep_TK, config)
  return Routing(expert_TK, weight_TK, keep_TK, load_E, scores_TE, logits_TE)


def choose(
  logits_PTE: jax.Array,
  bias_E: jax.Array,
  mask_T: jax.Array,
  config: ModelConfig,
  multiplicative: bool = False,
  shared: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """What `route_logits` decides if nothing is dropped, and nothing else: one kernel on GPUs, for few tokens.

  Args:
    logits_PTE: float32 parts that add up to the logits.
    bias_E, mask_T, config, multiplicative: as of `route`.
    shared: one assignment more per token, to an expert E, with weight 1.

  Returns:
    expert_TK, E + shared for all of a masked token, and weight_TK.
  """
  operands = align(logits_PTE, bias_E, mask_T)
  with_settings = lambda function: functools.partial(
    function, config=config, multiplicative=multiplicative, shared=shared
  )
  return lax.platform_dependent(*operands, cuda=with_settings(routing_gpu.choose), default=with_settings(_choose))


def _choose(logits_PTE, bias_E, mask_T, config, multiplicative, shared):
  routing = route_logits(logits_PTE.sum(0), bias_E, mask_T, config, multiplicative, dropless=True)
  more = ((0, 0), (0, int(shared)))
  expert_TK = jnp.pad(routing.expert_TK, more, constant_values=config.num_experts)
  expert_TK = jnp.where(mask_T[:, None], expert_TK, config.num_experts + shared)
  return expert_TK, jnp.pad(routing.weight_TK, more, constant_values=1)


def select(biased_TE: jax.Array, config: ModelConfig) -> jax.Array:
  """expert_TK: the top-k experts of the `top_groups` groups whose two best biased scores sum highest."""
  if config.num_groups > 1:
    biased_TGe = biased_TE.reshape(len(biased_TE), config.num_groups, -1)
    score_TG = lax.top_k(biased_TGe, 2)[0].sum(-1)
    group_TK = lax.top_k(score_TG, config.top_groups)[1]
    allowed_TG = (group_TK[:, :, None] == jnp.arange(config.num_groups)).any(1)
    # -inf, not 0: a negative bias would let an expert of a closed group win over an open one.
    biased_TE = jnp.where(allowed_TG[:, :, None], biased_TGe, -jnp.inf).reshape(biased_TE.shape)
  return lax.top_k(biased_TE, config.top_k)[1]


def capacity(tokens: int, config: ModelConfig) -> int:
  """Assignments an expert keeps per token shard: ceil(capacity_factor * T * K / E), at most T."""
  exact = config.capacity_factor * tokens * config.top_k / config.num_experts
  return min(tokens, int(-(-exact // 1)))


def within_capacity(expert_TK, weight_TK, keep_TK, config: ModelConfig) -> jax.Array:
  """keep_TK with each expert's assignments beyond its capacity dropped, lowest gate weights first (ties: later).

  Args:
    expert_TK: int32 experts of each token.
    weight_TK: float32 gate weights.
    keep_TK: bool, assignments that are there at all.
    config: num_experts, top_k and capacity_factor, which is not 0.
  """
  tokens = len(expert_TK)
  expert_M = jnp.where(keep_TK, expert_TK, config.num_experts).reshape(-1)
  # Sort by (expert, weight descending); a row's place inside its expert is its rank there.
  order_M = jnp.lexsort((-weight_TK.reshape(-1), expert_M))
  sorted_M = expert_M[order_M]
  first_M = (expert_M < jnp.arange(config.num_experts + 1)[:, None]).sum(1)[sorted_M]
  rank_M = (jnp.arange(len(order_M)) - first_M)[jnp.argsort(order_M)]
  return keep_TK & (rank_M < capacity(tokens, config)).reshape(keep_TK.shape)
