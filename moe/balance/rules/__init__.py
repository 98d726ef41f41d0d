"""Rules that move the routing bias by the loads of the last step. A rule is one object, and one file of this folder.

    none            the bias stays
    sign            by gamma towards the mean load (DeepSeek-V3's)
    centered_sign   the same, so that the biases keep summing to 0
    proportional    by the relative gap to the mean load
    rms             by that gap, at the sign rule's length
    multiplicative  as sign; the bias is a factor of the scores
    smebu           soft-clamped, with momentum
    quantile        to what would have balanced the batch

Loads are int32 counts summed over mesh and microbatches, the same everywhere, so the new bias is the same everywhere. c
is an expert's load, mean(c) the mean over the layer's experts, u the speed gamma.

The contract of a state: a dict of arrays [L, E, ...], which checkpoints hold whole. 'bias_LE', float32, is what the
router reads; all else is the rule's own. A run that starts from the weights of another (train.init_from) has the whole
state if that run had the same rule; otherwise it has the bias alone, and `start` makes the rest fit it. Without load,
or with gamma 0, `update` gives a state of `start` back as it is: a rule whose bias is a function of what it remembers
must derive that from the bias there.
"""

import abc

import jax
import jax.numpy as jnp

from moe.balance.routing import Routing
from moe.config import BalanceConfig, Config, ModelConfig
from moe.errors import UserError, short
from moe.registry import BIAS_RULES


class Rule(abc.ABC):
  """What a rule is asked. A file of this folder makes one of a subclass, as `RULE`."""

  factor = False  # whether the bias multiplies the scores, and starts at 1, or is added and starts at 0

  def check(self, config: Config) -> None:  # noqa: B027  # most have nothing to say
    """Raises UserError for a config that the rule cannot have. Called before anything is traced."""

  def start(self, bias_LE: jax.Array) -> dict[str, jax.Array]:
    """The state that goes on from a float32 bias: {'bias_LE': ..., and what else the rule remembers, [L, E] each}."""
    return {'bias_LE': bias_LE}

  def statistic(self, routing: Routing, bias_E: jax.Array, mask_T: jax.Array, model: ModelConfig) -> jax.Array:
    """What the rule counts of a shard's unmasked tokens besides loads, int32 [E, ...], to be added up over the batch.

    Integers, as float32 sums depend on the mesh.

    Args:
      routing: the router's decisions on this shard's tokens.
      bias_E: float32, the bias that it decided with.
      mask_T: bool, tokens that count.
      model: top_k, num_experts and what else the router was set to.
    """
    del routing, bias_E, mask_T
    return jnp.zeros((model.num_experts, 0), jnp.int32)

  @abc.abstractmethod
  def update(
    self, state: dict, load_LE: jax.Array, statistic: jax.Array, gamma: jax.Array, balance: BalanceConfig
  ) -> dict[str, jax.Array]:
    """The state after one optimizer step; arguments as of `update` of this folder.

    Args:
      state, load_LE, statistic, gamma, balance: as of `update` of this folder.
    """


class Direction(Rule):
  """A rule that remembers and counts nothing more: bias + gamma * direction of the loads."""

  @abc.abstractmethod
  def direction(self, load_LE: jax.Array) -> jax.Array:
    """float32 [L, E]."""

  def update(self, state, load_LE, statistic, gamma, balance):
    direction_LE = self.direction(load_LE)
    BIAS_RULES.expect(balance.bias_rule, 'direction()', direction_LE, load_LE.shape)
    return {'bias_LE': state['bias_LE'] + gamma * direction_LE}


def mean(load_LE: jax.Array) -> jax.Array:
  """float32 [L, 1] mean loads."""
  return load_LE.sum(-1, keepdims=True).astype(jnp.float32) / load_LE.shape[-1]


def gap(load_LE: jax.Array) -> jax.Array:
  """mean(c) - c. The mean's whole part is subtracted in int32: float32 would lose the sign of gaps in large counts."""
  E = load_LE.shape[-1]
  whole_L1, rest_L1 = jnp.divmod(load_LE.sum(-1, keepdims=True), E)
  return (whole_L1 - load_LE).astype(jnp.float32) + rest_L1.astype(jnp.float32) / E


def centered(x_LE: jax.Array) -> jax.Array:
  """With the mean over experts taken off."""
  return x_LE - x_LE.mean(-1, keepdims=True)


def init(balance: BalanceConfig, num_routers: int, num_experts: int) -> dict[str, jax.Array]:
  """State of the configured rule with a bias that changes no decision: 0, or 1 where it is a factor."""
  neutral = 1.0 if BIAS_RULES[balance.bias_rule].factor else 0.0
  return start(balance, jnp.full((num_routers, num_experts), neutral, jnp.float32))


def start(balance: BalanceConfig, bias_LE: jax.Array) -> dict[str, jax.Array]:
  """State of the configured rule that goes on from `bias_LE`, float32, which may be another rule's.

  Raises:
    UserError: the rule makes something else of it.
  """
  rule, shape = balance.bias_rule, bias_LE.shape
  state = BIAS_RULES[rule].start(bias_LE)
  if not isinstance(state, dict) or 'bias_LE' not in state:
    raise UserError(f"{BIAS_RULES.title(rule)} must give start() as a dict with 'bias_LE', not {short(state)}")
  for key, found in state.items():
    BIAS_RULES.expect(rule, f'start()[{key!r}]', found, (*shape, '...'))
  BIAS_RULES.expect(rule, "start()['bias_LE']", state['bias_LE'], shape, 'float32')
  return state


def statistic(
  routing: Routing, bias_E: jax.Array, mask_T: jax.Array, model: ModelConfig, balance: BalanceConfig
) -> jax.Array:
  """What the configured rule counts of a shard's tokens besides loads, int32 [E, ...].

  Args:
    routing, bias_E, mask_T, model: as of `Rule.statistic`.
    balance: bias_rule.

  Raises:
    UserError: the rule gives something else.
  """
  found = BIAS_RULES[balance.bias_rule].statistic(routing, bias_E, mask_T, model)
  BIAS_RULES.expect(balance.bias_rule, 'statistic()', found, (model.num_experts, '...'), 'int32')
  return found


def check_start(rule: str, theirs: str) -> None:
  """Raises UserError if `rule` cannot go on from a bias of the rule `theirs`, as one of the two is a factor."""
  if BIAS_RULES[rule].factor != BIAS_RULES[theirs].factor:
    what = {True: 'is a factor', False: 'is added'}
    raise UserError(
      f'config balance.bias_rule = {rule!r} cannot start from a run with {theirs!r}: the bias of {rule!r} '
      f'{what[BIAS_RULES[rule].factor]}, that of {theirs!r} {what[BIAS_RULES[theirs].factor]}'
    )


def update(
  state: dict, load_LE: jax.Array, statistic: jax.Array, gamma: jax.Array, balance: BalanceConfig
) -> dict[str, jax.Array]:
  """The state after one optimizer step.

  Args:
    state: as made by `init` or `start`.
    load_LE: int32 assignments per router and expert over the whole batch.
    statistic: the rule's own, summed over the batch: [L, E, ...].
    gamma: float32 speed of this step, at most balance.gamma; 0 leaves the bias as it is under every rule.
    balance: bias_rule and its constants.

  Raises:
    UserError: the rule gives other arrays than the state has, or of other shapes.
  """
  new = BIAS_RULES[balance.bias_rule].update(state, load_LE, statistic, gamma, balance)
  BIAS_RULES.expect_all(balance.bias_rule, 'update()', new, state)
  return new
