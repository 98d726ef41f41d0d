"""The bias that would have balanced the batch, from a histogram of what each expert lacked to be chosen.

A token's threshold alpha is its (K+1)-th biased score; expert j would be chosen if its bias were above alpha - score_j.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.balance.rules import Rule, centered
from moe.errors import UserError

MARGIN_BINS = 2048  # of the histogram, over MARGIN_RANGE
MARGIN_RANGE = (-1.0, 1.0)


class Quantile(Rule):
  """A moving average of `balancing_bias`, in which a batch weighs 1 - quantile_ema, and less as gamma falls."""

  def check(self, config):
    model = config.model
    if model.num_groups != 1:
      raise UserError(
        f"config balance.bias_rule = 'quantile' needs model.num_groups = 1, not {model.num_groups}: a token's "
        'threshold is only defined over all experts'
      )
    if model.top_k >= model.num_experts:
      raise UserError(
        f"config balance.bias_rule = 'quantile' needs model.top_k = {model.top_k} below model.num_experts"
      )

  def statistic(self, routing, bias_E, mask_T, model):
    return margin_histogram(routing.scores_TE, bias_E, mask_T, model.top_k)

  def update(self, state, load_LE, statistic, gamma, balance):
    share = (1 - balance.quantile_ema) * (gamma / max(balance.gamma, 1e-30))
    new_LE = (1 - share) * state['bias_LE'] + share * balancing_bias(load_LE, statistic)
    moves = (gamma > 0) & (load_LE.sum(-1, keepdims=True) > 0)
    return {'bias_LE': jnp.where(moves, new_LE, state['bias_LE'])}


def margin_histogram(scores_TE: jax.Array, bias_E: jax.Array, mask_T: jax.Array, top_k: int) -> jax.Array:
  """int32 [E, MARGIN_BINS] counts of score_j - alpha over unmasked tokens.

  Margins outside MARGIN_RANGE count in the outermost bins. Integers over fixed bins sum to the same on every mesh.

  Args:
    scores_TE: float32 scores of the router, before the bias.
    bias_E: float32 routing bias, added to them.
    mask_T: bool, tokens that count.
    top_k: experts per token: alpha is the best biased score, `top_k` better ones aside.
  """
  scores_TE = lax.stop_gradient(scores_TE)
  alpha_T1 = lax.top_k(scores_TE + bias_E, top_k + 1)[0][:, -1:]
  low, high = MARGIN_RANGE
  bin_TE = jnp.floor((scores_TE - alpha_T1 - low) * (MARGIN_BINS / (high - low))).astype(jnp.int32)
  bin_TE = jnp.clip(bin_TE, 0, MARGIN_BINS - 1) + jnp.arange(scores_TE.shape[1]) * MARGIN_BINS
  ones_TE = jnp.broadcast_to(mask_T[:, None], bin_TE.shape).astype(jnp.int32)
  total = scores_TE.shape[1] * MARGIN_BINS
  return jax.ops.segment_sum(ones_TE.reshape(-1), bin_TE.reshape(-1), total).reshape(-1, MARGIN_BINS)


def balancing_bias(load_LE: jax.Array, margins: jax.Array) -> jax.Array:
  """b_j = -(the margin that T K / E tokens of expert j exceed), centred, linear inside a bin: float32 [L, E].

  Args:
    load_LE: int32 assignments, whose sum says how many tokens there are.
    margins: int32 [L, E, MARGIN_BINS], as from `margin_histogram`.
  """
  low, high = MARGIN_RANGE
  target_L1 = load_LE.sum(-1, keepdims=True).astype(jnp.float32) / load_LE.shape[-1]
  # above[b]: tokens whose margin lies in bin b or higher. The quantile's bin is the last with above >= target.
  above = jnp.flip(jnp.cumsum(jnp.flip(margins, -1), -1), -1).astype(jnp.float32)
  bin_LE = jnp.maximum((above >= target_L1[..., None]).sum(-1) - 1, 0)
  pick = lambda a: jnp.take_along_axis(a, bin_LE[..., None], axis=-1)[..., 0]
  inside_LE = pick(margins).astype(jnp.float32)
  # Fraction of the bin, from its lower edge, that leaves `target` tokens above.
  fraction_LE = jnp.clip((pick(above) - target_L1) / jnp.maximum(inside_LE, 1), 0, 1)
  return centered(-(low + (bin_LE + fraction_LE) * ((high - low) / MARGIN_BINS)))


RULE = Quantile()
