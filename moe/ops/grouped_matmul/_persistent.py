"""What the persistent Hopper kernels share: tiles of an expert's rows, the loader's ring, and storing sums.

A kernel runs one block per SM, of one warpgroup that loads and two that multiply, each half the rows of a tile. The
loader runs ahead through a ring of shared-memory slots, across tile borders, so that the tensor cores meet no gap
between tiles. Per slot there are two barriers: `full` says that its copies have come, `empty` that both multipliers are
done with it.

Tiles begin where an expert's rows begin, so no tile holds rows of two experts: which expert and rows a tile has stands
in a table made outside, and costs nothing per expert. The last tile of an expert is moved back to end with it and
computes some rows twice, to equal values; only an expert with less than a tile of rows stores part of one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.ops.permute import key_of
from moe.ops.varying import vary, varying_axes

WG_ROWS = 64  # rows of a tile that each multiplying warpgroup computes
TILE_M = 2 * WG_ROWS
ROW_MULTIPLE = 8  # of every expert's rows: shared memory is swizzled in groups of 8 rows
SWIZZLE_BYTES = 128  # width of a row of such a group
BAND = 8  # tiles of rows that run over the same columns together, for the L2 cache's sake
REGISTERS = {2: (40, 232), 3: (32, 160)}  # number of multipliers -> registers of a loading and a multiplying thread
DEFAULT_SMS = 132  # of an H100, where the program is only lowered


class Tiles(NamedTuple):
  """Tiles of rows, in row order. used: int32 [1]; the others per tile, of which the first `used` are used."""

  used: jax.Array
  expert: jax.Array
  row: jax.Array  # first row
  rows: jax.Array  # rows to store: those of a tile, or the whole of a smaller expert


def tile_table(size_e: jax.Array, rows: int, tile_m: int = TILE_M) -> Tiles:
  """Which expert and rows each tile of `tile_m` rows has."""
  tiles_e = -(-size_e // tile_m)
  end_e, tiles_end_e = jnp.cumsum(size_e), jnp.cumsum(tiles_e)
  tile = jnp.arange(rows // tile_m + len(size_e))
  expert = jnp.minimum(key_of(tile, tiles_end_e), len(size_e) - 1)
  size, end = size_e[expert], end_e[expert]
  row = end - size + (tile - (tiles_end_e - tiles_e)[expert]) * tile_m
  row = jnp.where(size >= tile_m, jnp.minimum(row, end - tile_m), row)
  cast = lambda a: a.astype(jnp.int32)
  return Tiles(cast(tiles_end_e[-1:]), cast(expert), cast(row), cast(jnp.minimum(end - row, tile_m)))


def tile_of(i, tiles: Tiles, n_tiles: int, tile_n: int):
  """(expert, first row, rows to store, first column) of work item i of a kernel of tiles of rows x columns.

  Goes in bands of BAND row tiles; inside, all row tiles of a band before the next column tile.
  """
  first = i // (BAND * n_tiles) * BAND
  width = jnp.minimum(BAND, tiles.used[0] - first)
  inside = i - first * n_tiles
  m, n = first + inside % width, inside // width
  return tiles.expert[m], pl.multiple_of(tiles.row[m], ROW_MULTIPLE), tiles.rows[m], n * tile_n


def run(total, item, k_steps, load, multiply, store, slots: int, full, empty, multipliers: int = 2):
  """What each block does with its share of `total` work items: the loader's and the multipliers' loops.

  Args:
    total: int32 number of items.
    item: number of an item -> its description, `info`.
    k_steps: info -> slots' worth of operands that it takes.
    load: (info, k, slot, barrier) issues the copies of step k.
    multiply: (info, first, wg) waits for steps `first` and on, in slots numbered modulo `slots`, releases each and
      returns the sums of one warpgroup.
    store: (info, sums, wg) writes them.
    multipliers: number of multiplying warpgroups.
  """
  sm, sms, wg = lax.axis_index('sm'), lax.axis_size('sm'), lax.axis_index('wg')
  mine = (total - sm + sms - 1) // sms
  loader_registers, multiplier_registers = REGISTERS[multipliers]

  @pl.when(wg == multipliers)
  def _():
    plgpu.set_max_registers(loader_registers, action='decrease')

    def per_item(j, step):
      info = item(sm + j * sms)

      def per_k(k, _):
        slot = lax.rem(step + k, slots)
        plgpu.barrier_wait(empty.at[slot])
        load(info, k, slot, full.at[slot])

      lax.fori_loop(0, k_steps(info), per_k, None)
      return step + k_steps(info)

    lax.fori_loop(0, mine, per_item, jnp.int32(0))
    for slot in range(slots):  # no barrier may be left with an arrival that nobody waited for
      plgpu.barrier_wait(empty.at[slot])

  @pl.when(wg < multipliers)
  def _():
    plgpu.set_max_registers(multiplier_registers, action='increase')
    for slot in range(slots):
      plgpu.barrier_arrive(empty.at[slot])

    def per_item(j, step):
      info = item(sm + j * sms)
      store(info, multiply(info, step, wg), wg)
      return step + k_steps(info)

    lax.fori_loop(0, mine, per_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def store_rows(sums, staging, target, row, rows):
  """Writes the first `rows` of sums [WG_ROWS, columns], none if negative, to `target` from `row` on.

  Goes through two alternating pieces of shared memory. The size of a copy is static, so less than all rows take one
  copy per binary digit of their number.
  """
  width = staging.shape[-1]
  for i in range(sums.shape[1] // width):
    columns = pl.ds(i * width, width)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    piece = staging.at[i % 2]
    piece[...] = sums[:, i * width : (i + 1) * width].astype(staging.dtype)
    plgpu.commit_smem()
    size, left = WG_ROWS, jnp.clip(rows, 0, WG_ROWS)
    while size >= ROW_MULTIPLE:
      done = pl.multiple_of(left & ~(2 * size - 1), ROW_MULTIPLE)

      @pl.when(left & size != 0)
      def _(piece=piece, size=size, done=done, columns=columns):
        to = target.at[pl.ds(pl.multiple_of(row + done, ROW_MULTIPLE), size), columns]
        plgpu.copy_smem_to_gmem(piece.at[pl.ds(done, size)], to, commit_group=False)

      size //= 2
    plgpu.commit_smem_to_gmem_group()


def call(body, slots: int, ring: dict, shape, dtype, *operands, multipliers: int = 2):
  """Calls a persistent kernel.

  Args:
    body: function of references to the operands, the output, the ring's pieces, the staging memory of the output per
      multiplier, and the barriers `full` and `empty`.
    slots: of the ring.
    ring: name -> (shape, dtype) of what a slot holds, one copy each.
    shape, dtype: of the output.
    operands: arrays.
    multipliers: as in `run`.
  """
  pieces = [smem((slots, *piece), kind) for piece, kind in ring.values()]
  staging = smem((multipliers, 2, WG_ROWS, swizzled_width(dtype)), dtype)
  full = plgpu.Barrier(num_arrivals=len(ring), num_barriers=slots)
  empty = plgpu.Barrier(num_arrivals=multipliers, num_barriers=slots)
  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(shape, dtype),
    scratch_types=[*pieces, staging, full, empty],
    grid=(_num_sms(),),
    grid_names=('sm',),
    num_threads=multipliers + 1,
    thread_name='wg',
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
  )
  # A kernel's output carries no varying axes: without the cast, autodiff would add wrong reductions.
  return vary(kernel(*operands), varying_axes(operands))


def smem(shape, dtype):
  """Shared memory: swizzled for the tensor cores if a slot of it is a matrix, else plain."""
  if len(shape) < 3:
    return plgpu.SMEM(shape, dtype)
  # jax 0.12 declares a method of its protocol and not of these two, which mypy takes for abstract.
  tiling = plgpu.TilingTransform((ROW_MULTIPLE, swizzled_width(dtype)))  # type: ignore[abstract, unused-ignore]
  swizzle = plgpu.SwizzleTransform(SWIZZLE_BYTES)  # type: ignore[abstract, unused-ignore]
  return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def swizzled_width(dtype) -> int:
  """Elements in a row of a swizzled group."""
  return SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def pad_to_multiples(a, *multiples):
  """`a` with zeros at the end of each axis, up to a multiple."""
  return jnp.pad(a, [(0, -size % multiple) for size, multiple in zip(a.shape, multiples, strict=True)])


def zeros_like_kernel(shape, dtype, *operands):
  """What a kernel without rows returns."""
  return vary(jnp.zeros(shape, dtype), varying_axes(operands))


def _num_sms() -> int:
  device = jax.devices()[0]
  return device.core_count if device.platform == 'gpu' else DEFAULT_SMS
