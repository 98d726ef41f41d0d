"""Calls Pallas kernels that Triton compiles, inside `jax.shard_map` too."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.varying import vary, varying_axes


def span(start: jax.Array, size: int, least: int = 1):
  """(slice of `size` from `start`, widened to a power of two; bool [its length], True for the first `size`).

  Tensors in Triton are powers of two wide; tensor cores take no less than 16 (`least`). `start` must not be a constant,
  so add 0 times a program's number to one: Pallas refuses a slice that it knows to reach past the end, masked or not.
  """
  wide = max(least, pl.next_power_of_2(size))
  return pl.ds(start, wide), jnp.arange(wide) < size


def call(
  kernel, grid, operands, specs, outs, warps: int, stages: int, interpret: bool = False, aliases=()
) -> list[jax.Array]:
  """The outputs of a kernel, varying over whatever an operand varies over.

  Args:
    kernel: function of references to the operands and outputs.
    grid: programs per axis.
    operands, specs: arrays, and a BlockSpec for each.
    outs: (shape, dtype, BlockSpec) of each output.
    warps, stages: per program, and of its loops' software pipelines.
    interpret: run by jnp instead, on any platform.
    aliases: (operand, output) numbers: the output is what the operand was, where the kernel writes nothing else.
  """
  axes = varying_axes(operands)
  kind = jax.typeof(vary(jnp.zeros(()), axes)).manual_axis_type
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=specs,
    out_specs=[spec for _, _, spec in outs],
    out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in outs],
    compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    input_output_aliases=dict(aliases),
  )(*operands)
