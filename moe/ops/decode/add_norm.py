"""The residual stream: what a layer adds to it, and its RMSNorm (arXiv 1910.07467), in one kernel on GPUs.

A product of few rows comes as parts of a sum (`few_rows.parts_dense`), and that of experts as a row per expert to be
weighted. Adding these up, adding that to the stream and normalising it are three small kernels if left to XLA, and with
few rows a small kernel takes longer to start than to run. Nothing has a gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.norm import inverse_rms, rms_norm
from moe.ops.triton_call import call, span
from moe.ops.varying import align

WARPS = 16


class Sum(NamedTuple):
  """y_TD: the sum over P and K of weight_TK * parts_PMD, M = T * K. weight_TK: float32; None for ones, K = 1."""

  parts_PMD: jax.Array
  weight_TK: jax.Array | None = None

  def total(self) -> jax.Array:
    """float32 y_TD."""
    y_MD = self.parts_PMD.astype(jnp.float32).sum(0)
    if self.weight_TK is None:
      return y_MD
    return (y_MD.reshape(*self.weight_TK.shape, -1) * self.weight_TK[..., None]).sum(1)


class Stream(NamedTuple):
  """A residual stream, and what is still to be added to it."""

  x_TD: jax.Array
  sums: tuple[Sum, ...] = ()

  def total(self) -> jax.Array:
    """All added, in x's dtype."""
    return sum((one.total() for one in self.sums), self.x_TD.astype(jnp.float32)).astype(self.x_TD.dtype)


def add_norm(stream: Stream, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
  """The stream's total, and that over its root mean square, times scale_D: both x's shape and dtype.

  Sums and statistics are float32; the norm is that of the rounded total.
  """
  on_gpu, plain = (functools.partial(run, eps=eps) for run in (_on_gpu, _plain))
  return lax.platform_dependent(*align(stream, scale_D), cuda=on_gpu, default=plain)


def _plain(stream, scale_D, eps):
  x_TD = stream.total()
  return x_TD, rms_norm(x_TD, scale_D, eps)


def _on_gpu(stream, scale_D, eps, interpret=False):
  x_TD, sums = stream
  operands, weighted = [x_TD, scale_D, *jax.tree.leaves(sums)], [one.weight_TK is not None for one in sums]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  kernel = functools.partial(_kernel, weighted=weighted, eps=eps)
  outs = [(x_TD.shape, x_TD.dtype, anywhere)] * 2
  return tuple(call(kernel, (len(x_TD),), operands, [anywhere] * len(operands), outs, WARPS, 1, interpret))


def _kernel(x, scale, *refs, weighted: list[bool], eps: float):
  """One row per program."""
  (*of_sums, out, normed), t, D = refs, pl.program_id(0), x.shape[1]
  zero = t * 0  # hides indices: jax 0.10 interprets no constant one
  columns, inside = span(zero, D)
  load = lambda ref, *at: plt.load(ref.at[*at, columns], mask=inside, other=0)
  # All loads come before all arithmetic, so that they are under way together.
  values, scales, terms = load(x, t), load(scale), []
  for has_weight in weighted:
    parts, weight = of_sums.pop(0), of_sums.pop(0) if has_weight else None
    K = parts.shape[1] // x.shape[0]
    for k in range(K):
      of_parts = [load(parts, zero + p, t * K + k) for p in range(parts.shape[0])]
      terms.append((1.0 if weight is None else weight[t, zero + k], of_parts))
  total = values.astype(jnp.float32)
  for share, of_parts in terms:
    total += share * sum(part.astype(jnp.float32) for part in of_parts)
  rounded = total.astype(out.dtype)
  plt.store(out.at[t, columns], rounded, mask=inside)
  total = rounded.astype(jnp.float32)
  root = inverse_rms((total * total).sum(), D, eps)
  plt.store(normed.at[t, columns], (total * root * scales.astype(jnp.float32)).astype(normed.dtype), mask=inside)
