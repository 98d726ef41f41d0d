"""Dispatch and combine: how tokens reach their experts and come back. One backend per file, one contract:

    dispatch(x_TD, routing, config, ...) -> (x_MD, size_e, plan)    rows sorted by this shard's experts
    combine(y_MD, plan, in_fp8) -> y_TD                             gate-weighted sum of each token's kept assignments

    local       one expert shard: a permutation. The oracle of the others.
    all_gather  every expert shard gets all tokens of its row of shards and keeps what is its own; reduce-scatter back.
    all_to_all  rows travel in padded buffers, one per destination. Small when capacity is limited.
    ragged      rows travel unpadded by `jax.lax.ragged_all_to_all` (GPU and TPU only).

M, the number of rows, is static and covers the worst case; rows past sum(size_e) are unused. A row of a masked or
dropped assignment is not sent. `dispatch`'s `dropless` says that the routing ignored the capacity factor,
`row_multiple` what each expert's rows are padded to, with rows of zeros, as the grouped matmul wants it
(`moe.ops.grouped_matmul.ROW_MULTIPLES`), and `in_fp8` that rows travel to the experts in FP8 (`wire.py`).
"""

from moe.model.dispatch import all_gather, all_to_all, local, ragged

BACKENDS = {'local': local, 'all_gather': all_gather, 'all_to_all': all_to_all, 'ragged': ragged}


def resolve_backend(name: str, expert_shards: int) -> str:
  """The backend that 'auto' means on so many expert shards; any other name is kept."""
  return name if name != 'auto' else ('local' if expert_shards == 1 else 'all_gather')
