"""Kinds of attention one chunk of tokens at a time, with a cache; one per file, as in `moe.model.attention`.

A layer's cache is a dict of arrays [B, capacity, ...], named as the kind of `moe.model.attention` says.
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.config import ModelConfig
from moe.ops.varying import align, varying_axes


class Chunk(NamedTuple):
  """Tokens to run: position_BS in their sequences, valid_BS, and the rotary angles there."""

  position_BS: jax.Array
  valid_BS: jax.Array
  cos_BSR: jax.Array
  sin_BSR: jax.Array

  def rows_to_write(self, capacity: int) -> jax.Array:
    """int32 [B, S] rows of a cache for the chunk's tokens; for those not valid, past the end."""
    return jnp.where(self.valid_BS, self.position_BS, capacity)


class CachedAttention(abc.ABC):
  """What generation asks of a kind of attention. A file of this folder makes one of a subclass, as `ATTENTION`."""

  @abc.abstractmethod
  def weights(self, w: dict) -> dict:
    """The weights as generation multiplies with them, from one layer's of training; see `in_one`."""

  @abc.abstractmethod
  def attend(self, w: dict, cache: dict, x_TD: jax.Array, chunk: Chunk, model: ModelConfig) -> tuple[jax.Array, dict]:
    """One layer's attention inside `shard_map`.

    Args:
      w: of `weights`, as sharded; matrices may be quantised.
      cache: of the layer.
      x_TD: normed input, T = B * S.
      chunk: where its tokens stand.
      model: sizes of the whole model.

    Returns:
      This tensor shard's part of the output, as parts [P, T, D] that add up to it, and the cache with the chunk's valid
      tokens in it.
    """


def in_one(w: dict, groups: Sequence[Sequence[str]]) -> dict:
  """The weights with those that take attention's input side by side in one matrix, 'w_in_DF'.

  Args:
    w: of one layer.
    groups: names, in the matrix's order. Heads' columns of the names of a group stand side by side; each group has
      several axes after D, or one.
  """
  columns = align(*(side_by_side(w, names).reshape(w[names[0]].shape[0], -1) for names in groups))
  taken = {name for names in groups for name in names}
  return {name: a for name, a in w.items() if name not in taken} | {'w_in_DF': jnp.concatenate(columns, axis=1)}


def side_by_side(w: dict, names: Sequence[str]) -> jax.Array:
  """The arrays of these names, joined along the last axis."""
  return jnp.concatenate([w[name] for name in names], axis=-1)


def write(cache: jax.Array, new_BSX: jax.Array, row_BS: jax.Array) -> jax.Array:
  """`cache` [B, capacity, ...] with new rows at `row_BS`; those past the end are dropped."""
  row_B1 = jnp.arange(len(cache))[:, None]
  return cache.at[row_B1, row_BS].set(new_BSX.astype(cache.dtype), mode='drop')


def of_all_heads(new_BSX: jax.Array, cache: jax.Array) -> jax.Array:
  """Values that every shard of `tensor` has computed alike, of the same type as a cache that they share."""
  if varying_axes(cache) >= varying_axes(new_BSX):
    return new_BSX
  return lax.psum(jnp.where(lax.axis_index('tensor') == 0, new_BSX, 0), 'tensor')


def in_heads(x: jax.Array, width: int) -> jax.Array:
  """x [..., H * width] as [..., H, width]."""
  return x.reshape(*x.shape[:-1], -1, width)
