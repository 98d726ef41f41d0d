"""The contract of a dispatcher (`moe.model.dispatch`), for those that send all rows before the experts begin."""

from collections.abc import Callable

import jax

from moe.balance.routing import Routing
from moe.parallel.resolved import Resolved

ExpertsFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x_MD, size_e) -> y_MD


def expert_axis(resolved: Resolved) -> str:
  """The mesh axis that experts are divided over, for the dispatchers that send rows along it."""
  if resolved.axes.expert is None:
    raise ValueError(f'dispatch = {resolved.dispatch!r} needs an axis that experts are divided over')
  return resolved.axes.expert


def in_two_steps(dispatch: Callable, combine: Callable) -> Callable:
  """`apply` of dispatch(x_TD, routing, resolved) -> (x_MD, size_e, plan), combine(y_MD, plan, resolved) -> y_TD."""

  def apply(x_TD: jax.Array, routing: Routing, experts: ExpertsFn, resolved: Resolved) -> jax.Array:
    x_MD, size_e, plan = dispatch(x_TD, routing, resolved)
    return combine(experts(x_MD, size_e), plan, resolved)

  return apply
