"""Grouped matmul for CPU: loops over blocks of each expert's rows, one dense matmul per block.

Each expert's rows are cut into large tiles and the rest into smaller ones, whose last may reach past the expert. The
blocks go in row order, so the rows that a forward block computes too many are overwritten by their own expert's
block, and nothing needs padding. Loop bounds are the real sizes: FLOPs grow with the rows, not with the experts. Loops
with dynamic bounds have no reverse mode, and a scatter-free one is wanted anyway, hence the VJP of its own:

    y_MF = x_MD w_eDF        dx_MD = dy_MF w_eDF^T        dw_eDF = x_MD^T dy_MF   (per expert)
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.ops.grouped_matmul import Backend
from moe.ops.varying import vary, varying_axes

TILES = (128, 64, 32)  # rows of a block; the best measured at 128 to 1,024 rows per expert on 2 cores
DW_TILE, BATCH = 64, 8  # rows of a block of the weight gradient, and blocks at a time


@jax.custom_vjp
def matmul(x_MD: jax.Array, w_eDF: jax.Array, size_e: jax.Array) -> jax.Array:
  """See `moe.ops.grouped_matmul.grouped_matmul`. All operands must vary over the same mesh axes."""
  return _rows_by_matrix(x_MD, w_eDF, size_e, contract=1)


def _forward(x_MD, w_eDF, size_e):
  return matmul(x_MD, w_eDF, size_e), (x_MD, w_eDF, size_e)


def _backward(saved, dy_MF):
  x_MD, w_eDF, size_e = saved
  return _rows_by_matrix(dy_MF, w_eDF, size_e, contract=2), _rows_by_rows(x_MD, dy_MF, size_e), None


matmul.defvjp(_forward, _backward)


def _over_blocks(rows, size, start, step, carry):
  """Runs `step(tile, last, first_row, rows_left, carry)` over the blocks of one expert's `size` rows at `start`.

  Only blocks of the last, smallest tile can reach past the expert's rows.
  """
  tiles = [tile for tile in TILES if tile <= rows] or [rows]
  done = jnp.zeros_like(size)
  for tile in tiles:
    count = (size - done + (tile - 1 if tile == tiles[-1] else 0)) // tile

    def body(i, carry, tile=tile, done=done):
      return step(tile, tile == tiles[-1], start + done + i * tile, size - done - i * tile, carry)

    carry = lax.fori_loop(jnp.zeros_like(count), count, body, carry)
    done = done + count * tile
  return carry


def _slice(x, start, tile):
  """`tile` rows of x from `start`, moved up to end with x, and the numbers of the rows that came."""
  at = jnp.minimum(start, x.shape[0] - tile)
  return lax.dynamic_slice_in_dim(x, at, tile), at, at + jnp.arange(tile)


def _rows_by_matrix(x, w, size_e, contract):
  """y[r] = x[r] contracted with axis `contract` of the matrix of r's expert."""
  rows, start_e = x.shape[0], jnp.cumsum(size_e) - size_e
  y = vary(jnp.zeros((rows, w.shape[3 - contract]), x.dtype), varying_axes(x))

  def expert(e, y):
    matrix = w[e]

    def step(tile, last, first, left, y):
      x_tile, at, row = _slice(x, first, tile)
      y_tile = lax.dot_general(x_tile, matrix, (((1,), (contract - 1,)), ((), ()))).astype(y.dtype)
      if last:  # it may have been moved up, over rows that are done
        y_tile = jnp.where((row >= first)[:, None], y_tile, lax.dynamic_slice_in_dim(y, at, tile))
      return lax.dynamic_update_slice_in_dim(y, y_tile, at, 0)

    return _over_blocks(rows, size_e[e], start_e[e], step, y)

  return lax.fori_loop(0, w.shape[0], expert, y) if rows else y


def _rows_by_rows(x, dy, size_e):
  """dw[e] = x^T dy over the rows of expert e, summed in float32.

  Blocks of all experts are numbered through and worked off BATCH at a time, as one batched matmul: XLA:CPU spreads a
  batch over the cores, but not a product as small as one block's.
  """
  rows, end_e = x.shape[0], jnp.cumsum(size_e)
  tile = min(DW_TILE, rows)
  dw = vary(jnp.zeros((len(size_e), x.shape[1], dy.shape[1]), jnp.float32), varying_axes(x))
  if not rows:
    return dw.astype(x.dtype)
  last_block_e = jnp.cumsum(-(-size_e // tile))  # the number after each expert's last block

  def step(i, dw):
    block_N = i * BATCH + jnp.arange(BATCH)
    expert_N = jnp.minimum(jnp.searchsorted(last_block_e, block_N, side='right'), len(size_e) - 1)
    row_NT = (end_e[expert_N] - (last_block_e[expert_N] - block_N) * tile)[:, None] + jnp.arange(tile)
    # Blocks are laid out from an expert's end backwards: the first may begin before the expert, none ends after it.
    mine_NT = (row_NT >= (end_e - size_e)[expert_N][:, None]) & (block_N < last_block_e[-1])[:, None]
    x_NTD = jnp.where(mine_NT[..., None], x.at[row_NT].get(mode='clip'), 0)
    dw_NDF = jnp.einsum('ntd,ntf->ndf', x_NTD, dy.at[row_NT].get(mode='clip'), preferred_element_type=jnp.float32)
    for n in range(BATCH):
      dw = lax.dynamic_update_index_in_dim(dw, dw[expert_N[n]] + dw_NDF[n], expert_N[n], 0)
    return dw

  count = -(-last_block_e[-1] // BATCH)
  return lax.fori_loop(jnp.zeros_like(count), count, step, dw).astype(x.dtype)


BACKEND = Backend(matmul)
