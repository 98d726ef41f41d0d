"""What every dispatcher is given besides the tokens; see `moe.model.dispatch`."""

from collections.abc import Callable

import jax

ExpertsFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x_MD, size_e) -> y_MD
