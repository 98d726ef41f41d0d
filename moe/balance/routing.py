"""What a router decided: the form in which decisions reach dispatchers, losses and statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.ops.varying import align


class Routing(NamedTuple):
  """Decisions for one shard's tokens.

  expert_TK: int32 expert of each assignment.
  weight_TK: float32 gate weight of each assignment, differentiable.
  keep_TK: bool, False for assignments of masked tokens and those dropped over capacity.
  load_E: int32 assignments per expert before dropping, unmasked tokens only; this shard's tokens only.
  scores_TE: float32 scores before the bias, differentiable.
  logits_TE: float32 router logits, differentiable.
  """

  expert_TK: jax.Array
  weight_TK: jax.Array
  keep_TK: jax.Array
  load_E: jax.Array
  scores_TE: jax.Array
  logits_TE: jax.Array


def count(expert_TK: jax.Array, keep_TK: jax.Array, num_experts: int) -> jax.Array:
  """int32 kept assignments per expert."""
  expert_M, keep_M = align(expert_TK.reshape(-1), keep_TK.reshape(-1).astype(jnp.int32))
  return jax.ops.segment_sum(keep_M, expert_M, num_experts)
