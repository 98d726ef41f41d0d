"""What a router reports for one microbatch of one shard: sums, to be added over microbatches and mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance import rules
from moe.balance.routing import Routing, count
from moe.config import Config


class Chosen(NamedTuple):
  """What a router gave each token of this shard, [B, S, K]: int32 experts, best first, and float32 gate weights.

  A token that was not routed, such as padding, has expert -1 and weight 0.
  """

  expert_BSK: jax.Array
  weight_BSK: jax.Array


class RouterStats(NamedTuple):
  """Sums over this shard's unmasked tokens. Stacked over layers, each field has L in front.

  load_E: int32 assignments before dropping. dropped: int32 assignments dropped.
  prob_sum_E: scores normalised over experts (differentiable). sequence_sum: per sequence E/(K T_s) sum_i f_i P_i,
  times its T_s tokens (differentiable; 0 unless used). z_sum: logsumexp(logits)^2 (differentiable).
  entropy_sum: entropy of the normalised scores / ln E.
  statistic: int32 [E, ...], what the bias rule wants to know besides; [E, 0] for most.
  chosen: no sum, but what each token was given, where `Resolved.each_token` asks for it; else ().
  """

  load_E: jax.Array
  dropped: jax.Array
  prob_sum_E: jax.Array
  sequence_sum: jax.Array
  z_sum: jax.Array
  entropy_sum: jax.Array
  statistic: jax.Array
  chosen: Chosen | tuple = ()


def router_stats(routing: Routing, bias_E: jax.Array, mask_BS: jax.Array, config: Config) -> RouterStats:
  """Statistics of one router; see `RouterStats`.

  Args:
    routing: the router's decisions on this shard's T = B * S tokens.
    bias_E: float32, the bias that it decided with.
    mask_BS: bool, tokens that count.
    config: model, balance.aux_loss, and balance.bias_rule, whose statistic is taken.
  """
  model, balance = config.model, config.balance
  mask_T = mask_BS.reshape(-1)
  kept = routing.keep_TK.sum(dtype=jnp.int32)
  probs_TE = routing.scores_TE / (routing.scores_TE.sum(-1, keepdims=True) + 1e-20)
  probs_TE = jnp.where(mask_T[:, None], probs_TE, 0)
  z_T = jax.nn.logsumexp(routing.logits_TE, axis=-1)
  fixed_TE = lax.stop_gradient(probs_TE)
  entropy = -(fixed_TE * jnp.log(fixed_TE + 1e-20)).sum() / jnp.log(max(model.num_experts, 2))
  zero = jnp.zeros_like(z_T[0])
  return RouterStats(
    load_E=routing.load_E,
    dropped=routing.load_E.sum(dtype=jnp.int32) - kept,
    prob_sum_E=probs_TE.sum(0),
    sequence_sum=_sequence_sum(routing, probs_TE, mask_BS, config) if balance.aux_loss == 'sequence' else zero,
    z_sum=jnp.where(mask_T, z_T * z_T, 0).sum() if balance.z_loss else zero,
    entropy_sum=entropy,
    statistic=rules.statistic(routing, bias_E, mask_T, model, balance),
  )


def chosen(routing: Routing, mask_BS: jax.Array) -> Chosen:
  """What each token was given; with nothing dropped, `load_E` counts the same."""
  in_rows = lambda a_TK, other: jnp.where(mask_BS[..., None], a_TK.reshape(*mask_BS.shape, -1), other)
  return Chosen(in_rows(routing.expert_TK, -1), in_rows(routing.weight_TK, 0))


def _sequence_sum(routing: Routing, probs_TE, mask_BS, config: Config):
  """Sum over sequences of T_s * sum_i f_i P_i (arXiv 2412.19437, equations 17-20); f counts top-k without the bias."""
  E, K = config.model.num_experts, config.model.top_k
  chosen_TK = lax.top_k(lax.stop_gradient(routing.scores_TE), K)[1]
  in_sequence = lambda a: a.reshape(*mask_BS.shape, -1)
  count_BE = jax.vmap(
    lambda chosen_SK, mask_S: count(chosen_SK, jnp.broadcast_to(mask_S[:, None], chosen_SK.shape), E)
  )(in_sequence(chosen_TK), mask_BS)
  tokens_B1 = jnp.maximum(mask_BS.sum(-1, keepdims=True), 1)
  return (count_BE * E / (K * tokens_B1) * in_sequence(probs_TE).sum(1)).sum()
