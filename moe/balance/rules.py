"""Bias rules: the router bias of the next step from the loads of this one.

`init` makes a rule's state, `start` makes it from a bias that stands already, `update` advances it once per optimizer
step. Loads are int32 counts summed over mesh and microbatches, the same everywhere, so the new bias is the same
everywhere. c is an expert's load, mean(c) the mean over the layer's experts, u the speed gamma.

The contract of a state: a dict of arrays [L, E, ...], which checkpoints hold whole. 'bias_LE', float32, is what the
router reads; all else is the rule's own. A run that starts from the weights of another (train.init_from) has the whole
state if that run had the same rule; otherwise it has the bias alone, and `start` makes the rest fit it. Without load,
or with gamma 0, `update` gives a state of `start` back as it is: a rule whose bias is a function of what it remembers
must derive that from the bias there.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.config import BalanceConfig
from moe.errors import UserError

MARGIN_BINS = 2048  # of the quantile rule's histogram, over MARGIN_RANGE
MARGIN_RANGE = (-1.0, 1.0)


def init(balance: BalanceConfig, num_routers: int, num_experts: int) -> dict[str, jax.Array]:
  """State of the configured rule with a bias that changes no decision: 0, or 1 where it is a factor."""
  neutral = 1.0 if balance.bias_rule == 'multiplicative' else 0.0
  return start(balance, jnp.full((num_routers, num_experts), neutral, jnp.float32))


def start(balance: BalanceConfig, bias_LE: jax.Array) -> dict[str, jax.Array]:
  """State of the configured rule that goes on from `bias_LE`, float32, which may be another rule's."""
  state = {'bias_LE': bias_LE}
  if balance.bias_rule == 'smebu':
    state['momentum_LE'] = jnp.zeros_like(bias_LE)
  return state


def check_start(rule: str, theirs: str) -> None:
  """Raises UserError if `rule` cannot go on from a bias of the rule `theirs`, as one of the two is a factor."""
  if rule != theirs and 'multiplicative' in (rule, theirs):
    raise UserError(
      f"config balance.bias_rule = {rule!r} cannot start from a run with {theirs!r}: the bias of 'multiplicative' is a "
      'factor, that of other rules is added'
    )


def update(state: dict, load_LE: jax.Array, margins: jax.Array, gamma: jax.Array, balance: BalanceConfig) -> dict:
  """The state after one optimizer step.

  Args:
    state: as made by `init` or `start`.
    load_LE: int32 assignments per router and expert over the whole batch.
    margins: int32 [L, E, MARGIN_BINS] histogram for the quantile rule (`margin_histogram`), else unused.
    gamma: float32 speed of this step, at most balance.gamma; 0 leaves the bias as it is under every rule.
    balance: bias_rule and its constants.
  """
  bias_LE = state['bias_LE']
  if balance.bias_rule == 'none':
    return state
  if balance.bias_rule == 'quantile':
    return {'bias_LE': _quantile(bias_LE, load_LE, margins, gamma, balance)}
  gap_LE = _gap(load_LE)
  if balance.bias_rule == 'smebu':
    return _smebu(state, gap_LE / jnp.maximum(_mean(load_LE), 1), gamma, balance)
  return {'bias_LE': bias_LE + gamma * DIRECTIONS[balance.bias_rule](gap_LE, load_LE)}


def _mean(load_LE):
  return load_LE.sum(-1, keepdims=True).astype(jnp.float32) / load_LE.shape[-1]


def _gap(load_LE):
  """mean(c) - c. The mean's whole part is subtracted in int32: float32 would lose the sign of gaps in large counts."""
  E = load_LE.shape[-1]
  whole_L1, rest_L1 = jnp.divmod(load_LE.sum(-1, keepdims=True), E)
  return (whole_L1 - load_LE).astype(jnp.float32) + rest_L1.astype(jnp.float32) / E


def _centered(x_LE):
  return x_LE - x_LE.mean(-1, keepdims=True)


def _sign(gap_LE, load_LE):
  """sign(mean(c) - c) (arXiv 2408.15664, algorithm 1)."""
  return jnp.sign(gap_LE)


def _centered_sign(gap_LE, load_LE):
  """The sign rule with its mean over experts taken off, so that the biases keep summing to 0."""
  return _centered(jnp.sign(gap_LE))


def _proportional(gap_LE, load_LE):
  """(mean(c) - c) / mean(c) (arXiv 2512.03915)."""
  return gap_LE / jnp.maximum(_mean(load_LE), 1)


def _rms(gap_LE, load_LE):
  """(mean(c) - c) / RMS over experts of it: the proportional direction with the sign rule's step length."""
  return gap_LE / jnp.sqrt(jnp.maximum(jnp.mean(gap_LE * gap_LE, -1, keepdims=True), 1e-12))


# 'multiplicative' moves like 'sign'; its bias starts at 1 and multiplies the scores (arXiv 2408.15664, table 4).
DIRECTIONS = {
  'sign': _sign,
  'centered_sign': _centered_sign,
  'proportional': _proportional,
  'rms': _rms,
  'multiplicative': _sign,
}


def _smebu(state, violation_LE, gamma, balance):
  """Soft-clamped momentum update (arXiv 2602.17004): m = beta m + (1 - beta) centred(u tanh(kappa v)); b += m."""
  step_LE = _centered(gamma * jnp.tanh(balance.smebu_kappa * violation_LE))
  momentum_LE = balance.smebu_beta * state['momentum_LE'] + (1 - balance.smebu_beta) * step_LE
  momentum_LE = jnp.where(gamma > 0, momentum_LE, state['momentum_LE'])
  return {'bias_LE': state['bias_LE'] + jnp.where(gamma > 0, momentum_LE, 0), 'momentum_LE': momentum_LE}


def margin_histogram(scores_TE: jax.Array, bias_E: jax.Array, mask_T: jax.Array, top_k: int) -> jax.Array:
  """int32 [E, MARGIN_BINS] counts of score_j - alpha over unmasked tokens.

  alpha is the token's (K+1)-th biased score: expert j would be chosen if its bias were above alpha - score_j. Margins
  outside MARGIN_RANGE count in the outermost bins. Integers over fixed bins sum to the same on every mesh.
  """
  scores_TE = lax.stop_gradient(scores_TE)
  alpha_T1 = lax.top_k(scores_TE + bias_E, top_k + 1)[0][:, -1:]
  low, high = MARGIN_RANGE
  bin_TE = jnp.floor((scores_TE - alpha_T1 - low) * (MARGIN_BINS / (high - low))).astype(jnp.int32)
  bin_TE = jnp.clip(bin_TE, 0, MARGIN_BINS - 1) + jnp.arange(scores_TE.shape[1]) * MARGIN_BINS
  ones_TE = jnp.broadcast_to(mask_T[:, None], bin_TE.shape).astype(jnp.int32)
  total = scores_TE.shape[1] * MARGIN_BINS
  return jax.ops.segment_sum(ones_TE.reshape(-1), bin_TE.reshape(-1), total).reshape(-1, MARGIN_BINS)


def _quantile(bias_LE, load_LE, margins, gamma, balance):
  """A moving average of `_quantile_bias`, in which a batch weighs 1 - quantile_ema, and less as gamma falls."""
  share = (1 - balance.quantile_ema) * (gamma / max(balance.gamma, 1e-30))
  new_LE = (1 - share) * bias_LE + share * _quantile_bias(load_LE, margins)
  return jnp.where((gamma > 0) & (load_LE.sum(-1, keepdims=True) > 0), new_LE, bias_LE)


def _quantile_bias(load_LE, margins):
  """b_j = -(the margin that T K / E tokens of expert j exceed), centred, linear inside a bin."""
  low, high = MARGIN_RANGE
  target_L1 = load_LE.sum(-1, keepdims=True).astype(jnp.float32) / load_LE.shape[-1]
  # above[b]: tokens whose margin lies in bin b or higher. The quantile's bin is the last with above >= target.
  above = jnp.flip(jnp.cumsum(jnp.flip(margins, -1), -1), -1).astype(jnp.float32)
  bin_LE = jnp.maximum((above >= target_L1[..., None]).sum(-1) - 1, 0)
  pick = lambda a: jnp.take_along_axis(a, bin_LE[..., None], axis=-1)[..., 0]
  inside_LE = pick(margins).astype(jnp.float32)
  # Fraction of the bin, from its lower edge, that leaves `target` tokens above.
  fraction_LE = jnp.clip((pick(above) - target_L1) / jnp.maximum(inside_LE, 1), 0, 1)
  return _centered(-(low + (bin_LE + fraction_LE) * ((high - low) / MARGIN_BINS)))
