"""How parameters are declared: fp32, normal with the config's standard deviation; and the variable of the bias."""

import jax
import jax.numpy as jnp
from flax import nnx


class RouterBias(nnx.Variable):
  """The routing bias: fp32 state outside gradient, optimizer, weight decay and mixed precision; in every checkpoint."""


class Init:
  """Makes the parameters of a module. `stack` is () for one layer, (L,) for L layers stacked in front."""

  def __init__(self, rngs: nnx.Rngs, std: float, stack: tuple[int, ...] = ()):
    self.rngs, self.std, self.stack = rngs, std, stack

  def normal(self, *shape: int) -> nnx.Param:
    return nnx.Param(self.std * jax.random.normal(self.rngs.params(), (*self.stack, *shape), jnp.float32))

  def ones(self, *shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones((*self.stack, *shape), jnp.float32))


def is_float32(name: str) -> bool:
  """Parameters that stay float32 under every precision policy: the router and the norms' scales."""
  return name.startswith(('w_router', 'scale'))
