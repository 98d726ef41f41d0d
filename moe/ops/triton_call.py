"""Calls Pallas kernels that Triton compiles, inside `jax.shard_map` too."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.ops.varying import vary, varying_axes


def call(
  kernel, grid, operands, specs, outs, warps: int, stages: int, interpret: bool = False, aliases=()
) -> list[jax.Array]:
  """The outputs of a kernel, varying over whatever an operand varies over.

  Args:
    kernel: function of references to the operands and outputs.
    grid: programs per axis.
    operands: arrays, and `specs` a BlockSpec for each.
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
