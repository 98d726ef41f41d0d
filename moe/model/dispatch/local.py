"""One expert shard: sort the assignments by expert. No communication; the oracle of the other backends."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.balance.routing import Routing
from moe.model.dispatch._contract import in_two_steps
from moe.ops.permute import Permutation, combine_rows, lay_out, permute
from moe.parallel.resolved import Resolved


class Plan(NamedTuple):
  back: Permutation
  weight_TK: jax.Array


def dispatch(x_TD: jax.Array, routing: Routing, resolved: Resolved):
  """(x_MD, size_e, plan). M = T * K, padded. Nothing is sent, so nothing is rounded."""
  model, assignments = resolved.model, routing.expert_TK.size
  order = routing.expert_TK, routing.keep_TK, model.num_experts, assignments, resolved.row_multiple
  out, back, size_e = expert_order(*order)
  return permute(x_TD, out), size_e, Plan(back, routing.weight_TK)


def combine(y_MD: jax.Array, plan: Plan, resolved: Resolved) -> jax.Array:
  """The gate-weighted sum of each token's rows."""
  del resolved
  return combine_rows(y_MD, plan.back, plan.weight_TK)


def expert_order(expert_TK, keep_TK, num_experts: int, rows: int, row_multiple: int):
  """Permutations that bring tokens into the order of `num_experts` experts, and rows back to assignments.

  Args:
    expert_TK: expert of each assignment, in 0..num_experts-1 where keep_TK.
    keep_TK: assignments to move; there are at most `rows` of them.
    num_experts: that rows are brought into the order of.
    rows: the most there can be before padding.
    row_multiple: what every expert's rows are padded to.

  Returns:
    out: Permutation from T tokens to rows, back: from rows to T * K assignments, size_e: rows per expert.
  """
  layout = lay_out(jnp.where(keep_TK, expert_TK, num_experts).reshape(-1), num_experts, rows, row_multiple)
  return *layout.permutations(keep_TK), layout.size


apply = in_two_steps(dispatch, combine)
