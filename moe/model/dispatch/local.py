"""One expert shard: sort the assignments by expert. No communication; the oracle of the other backends."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.config import ModelConfig
from moe.model.dispatch.permute import Permutation, permute, sort_by_key, weighted_sum
from moe.model.router import Routing


class Plan(NamedTuple):
  back: Permutation
  weight_TK: jax.Array


def dispatch(x_TD: jax.Array, routing: Routing, config: ModelConfig, dropless: bool = False):
  """See `moe.model.dispatch`. M = T * K."""
  out, back, size_e = expert_order(routing.expert_TK, routing.keep_TK, config.num_experts, routing.expert_TK.size)
  return permute(x_TD, out), size_e, Plan(back, routing.weight_TK)


def combine(y_MD: jax.Array, plan: Plan) -> jax.Array:
  """See `moe.model.dispatch`."""
  return weighted_sum(permute(y_MD, plan.back), plan.weight_TK)


def expert_order(expert_TK, keep_TK, num_experts: int, rows: int):
  """Permutations that bring tokens into the order of `num_experts` experts, and rows back to assignments.

  Args:
    expert_TK: expert of each assignment, in 0..num_experts-1 where keep_TK.
    keep_TK: assignments to move; there are at most `rows` of them.

  Returns:
    out: Permutation from T tokens to `rows` rows, back: from rows to T * K assignments, size_e: rows per expert.
  """
  T, K = expert_TK.shape
  by = sort_by_key(jnp.where(keep_TK, expert_TK, num_experts).reshape(-1), num_experts)
  order_M, valid_M = by.order_M[:rows], jnp.arange(rows) < by.size.sum()
  place_TK = by.place_M.reshape(T, K)
  out = Permutation(order_M // K, valid_M, place_TK, keep_TK)
  back = Permutation(by.place_M, keep_TK.reshape(-1), order_M[:, None], valid_M[:, None])
  return out, back, by.size
