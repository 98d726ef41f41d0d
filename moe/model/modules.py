"""The mixture of experts as a Flax module, NNX or Linen, around `standalone.MoE`."""

import jax
from flax import linen, nnx

from moe.model.parameters import RouterBias
from moe.model.standalone import MoE, Stats


class NNXMoE(nnx.Module):
  """An NNX module: its parameters are `nnx.Param`, its bias and the rule's state `RouterBias`, for no optimizer.

  Args:
    layer: the settings, and with them mesh and axes.
    rngs: for the parameters.
  """

  bias_E: RouterBias

  def __init__(self, layer: MoE, *, rngs: nnx.Rngs):
    self.layer = layer
    self.weights = layer.module(rngs)
    for name, value in layer.init_balance().items():
      setattr(self, name, RouterBias(value))

  def __call__(self, x_BSD: jax.Array, mask_BS: jax.Array | None = None, dropless: bool = False):
    """(y_BSD, Stats); see `MoE.apply`."""
    params = nnx.to_pure_dict(nnx.state(self.weights))
    return self.layer.apply(params, self.bias_E[...], x_BSD, mask_BS, dropless)

  def update_bias(self, stats: Stats, gamma: float | None = None) -> None:
    """Once per optimizer step, with the `Stats` of all its tokens; see `MoE.update_bias`."""
    balance = {name: getattr(self, name)[...] for name in self.layer.init_balance()}
    for name, value in self.layer.update_bias(balance, stats, gamma).items():
      getattr(self, name)[...] = value


class LinenMoE(linen.Module):
  """A Linen module: parameters in the collection 'params', the rule's state in 'balance'.

  The bias changes once per optimizer step, not per call: `layer.update_bias(variables['balance']['state'], stats)`.
  """

  layer: MoE

  @linen.compact
  def __call__(self, x_BSD: jax.Array, mask_BS: jax.Array | None = None, dropless: bool = False):
    """(y_BSD, Stats); see `MoE.apply`."""
    params = self.param('moe', self.layer.init)
    balance = self.variable('balance', 'state', self.layer.init_balance)
    return self.layer.apply(params, balance.value['bias_E'], x_BSD, mask_BS, dropless)
