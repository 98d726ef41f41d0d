"""Dispatch and combine: how tokens reach their experts and come back. One dispatcher per file, one contract,
so that a dispatcher may interleave the two:

    apply(x_TD, routing, experts, resolved) -> y_TD     the gate-weighted sum of each token's kept assignments

    experts(x_MD, size_e) -> y_MD                       rows sorted by this shard's experts, through them

    local       one expert shard: a permutation. The oracle of the others.
    all_gather  every expert shard gets all tokens of its row of shards and keeps what is its own; reduce-scatter back.
    all_to_all  rows travel in padded buffers, one per destination. Small when capacity is limited.
    ragged      rows travel unpadded by `jax.lax.ragged_all_to_all` (GPU and TPU only).

M, the number of rows, is static and covers the worst case; rows past sum(size_e) are unused. A row of a masked or
dropped assignment is not sent. Each expert's rows are padded to `resolved.row_multiple` with rows of zeros, as the
grouped matmul wants it. With precision.fp8=dispatch, rows travel to the experts in FP8 (`_wire.py`).
"""

from collections.abc import Callable

import jax

from moe.balance.routing import Routing
from moe.parallel.resolved import Resolved
from moe.registry import DISPATCHERS


def dispatch(x_TD: jax.Array, routing: Routing, experts: Callable, resolved: Resolved) -> jax.Array:
  """y_TD of the dispatcher that is chosen, `resolved.dispatch`.

  Args:
    x_TD, routing, experts, resolved: of the contract above.

  Raises:
    UserError: the dispatcher gives an array of another shape.
  """
  y_TD = DISPATCHERS[resolved.dispatch](x_TD, routing, experts, resolved)
  DISPATCHERS.expect(resolved.dispatch, 'y_TD', y_TD, x_TD.shape, x_TD.dtype)
  return y_TD
