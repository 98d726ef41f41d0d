"""What crosses `expert`: rows in the compute dtype, or in FP8 one way (arXiv 2412.19437, section 3.3.3).

With `precision.fp8=dispatch`, rows travel in FP8 on their way to the experts: tokens in `dispatch`, and in the backward
pass the gradients of what `combine` brought home. On the way back, where sums are made, both keep the compute dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe.ops import fp8
from moe.ops.varying import align
from moe.parallel.resolved import Resolved


def in_fp8(resolved: Resolved) -> bool:
  """Whether rows travel so."""
  return 'dispatch' in resolved.precision.fp8_modules


def to_experts(there: Callable, back: Callable, rows, operands=(), in_fp8: bool = False) -> jax.Array:
  """there(rows, operands), in FP8 if `in_fp8`; its gradient comes back in the rows' dtype.

  Args:
    there, back: linear in the rows and the transposes of one another, on arrays of any dtype; top-level functions or
      partials of such with hashable arguments.
    rows: [..., D].
    operands: arrays that say what goes where; no gradient.
  """
  return _exchange(there, back, (True, False), *align(rows, operands)) if in_fp8 else there(rows, operands)


def from_experts(there: Callable, back: Callable, rows, operands=(), in_fp8: bool = False) -> jax.Array:
  """there(rows, operands) in the rows' dtype; its gradient travels in FP8 if `in_fp8`. See `to_experts`."""
  return _exchange(there, back, (False, True), *align(rows, operands)) if in_fp8 else there(rows, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(there, back, in_fp8, rows, operands):
  return _travel(there, rows, operands, in_fp8[0])


def _forward(there, back, in_fp8, rows, operands):
  return _travel(there, rows, operands, in_fp8[0]), operands


def _backward(there, back, in_fp8, operands, drows):
  return _travel(back, drows, operands, in_fp8[1]), None


_exchange.defvjp(_forward, _backward)


def _travel(exchange, rows, operands, in_fp8: bool):
  if not in_fp8:
    return exchange(rows, operands)
  x = fp8.quantize(rows, fp8.ROWS, power_of_two=True)
  # As bytes, which every collective on every platform carries.
  value = exchange(lax.bitcast_convert_type(x.value, jnp.uint8), operands)
  arrived = fp8.Quantized(lax.bitcast_convert_type(value, x.value.dtype), exchange(x.scale, operands))
  return fp8.dequantize(arrived, fp8.ROWS).astype(rows.dtype)
