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
