"""AdamW with warm-up schedules, on global arrays: norms and clipping are right under every sharding."""

import jax
import jax.numpy as jnp
import optax

from moe.config import BalanceConfig, OptimizerConfig
from moe.parallel.sharding import is_matrix


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Schedule over `steps` optimizer steps, counted from 0: warm-up to the peak, then by config.schedule.

  wsd holds the peak and falls linearly over the last `decay_fraction` of the steps; cosine falls all the way. Both end
  at `final_lr_fraction` of the peak.
  """
  peak, final = config.learning_rate, config.learning_rate * config.final_lr_fraction
  warmup = min(config.warmup_steps, steps)
  if config.schedule == 'cosine':
    fall, start = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_lr_fraction), warmup
  else:
    length = min(round(steps * config.decay_fraction), steps - warmup)
    fall, start = optax.linear_schedule(peak, final, max(length, 1)), steps - length
  # Step 0 already learns: the warm-up's k-th step has k/warmup of the peak.
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, start])


def bias_speed(config: BalanceConfig, steps: int):
  """gamma as a function of the step: constant, then falling linearly, then 0, as config's three fractions say."""
  last = steps - round(steps * config.gamma_off_fraction)
  length = max(round(steps * config.gamma_decay_fraction), 1)
  fall = optax.linear_schedule(config.gamma, config.gamma * config.gamma_final_fraction, length, last - length)
  return lambda step: jnp.where(step < last, fall(step), 0.0).astype(jnp.float32)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Global-norm clip, Adam, decoupled weight decay on matrices only, learning rate."""
  adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
  return optax.chain(
    # Keeps its place without clipping, so that the state's names, and with them checkpoints, do not depend on it.
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    _moments_as(jnp.dtype(config.moments), adam),
    optax.add_decayed_weights(config.weight_decay, mask=_matrices),
    optax.scale_by_learning_rate(learning_rate(config, steps)),
  )


def _matrices(params):
  return jax.tree.map_with_path(lambda path, _: is_matrix(path[-1].key), params)


def _moments_as(dtype, adam: optax.GradientTransformation) -> optax.GradientTransformation:
  """Adam whose two moments rest in `dtype` and are float32 while computing (arXiv 2412.19437, section 3.3.3)."""
  cast = lambda tree, to: jax.tree.map(lambda a: a.astype(to), tree)
  rest = lambda state, to: state._replace(mu=cast(state.mu, to), nu=cast(state.nu, to))

  def update(updates, state, params=None):
    updates, state = adam.update(updates, rest(state, jnp.float32), params)
    return updates, rest(state, dtype)

  return optax.GradientTransformation(lambda params: rest(adam.init(params), dtype), update)
