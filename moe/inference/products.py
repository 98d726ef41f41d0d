"""Products of generation: of few rows, in parts that whoever reads them adds up, or of many."""

import jax

from moe.inference.quantize import is_quantized
from moe.ops import weights
from moe.ops.decode import few_rows
from moe.ops.swiglu import gated

FEW_DENSE = 64  # rows up to which kernels stream a matrix once rather than fill tensor cores


def project(x_TK: jax.Array, w) -> jax.Array:
  """x times w, whose axes are flattened to [K, N] if it is an array of more: parts [P, T, N] that add up to that."""
  w = w if is_quantized(w) else w.reshape(x_TK.shape[-1], -1)
  return few_rows.parts_dense(x_TK, w) if len(x_TK) <= FEW_DENSE else dense(x_TK, w)[None]


def feed_forward(gate, up, down, x_TD: jax.Array, expert: int | None = None) -> jax.Array:
  """This tensor shard's part of a dense SwiGLU, as parts [P, T, D]; of one expert's matrices if they are several.

  Args:
    gate, up, down: this tensor shard's [D, F] twice and [F, D], or with e in front; arrays or quantised, of one kind.
    x_TD: rows.
    expert: number of the matrices that all rows go through; None: there is one of each.
  """
  if len(x_TD) <= FEW_DENSE:
    return few_rows.feed_forward_dense(x_TD, gate, up, down, expert)
  gate, up, down = few_rows.matrix((gate, up, down), expert)
  return dense(gated(dense(x_TD, gate), dense(x_TD, up)), down)[None]


def dense(x_TD: jax.Array, w) -> jax.Array:
  """Many rows times a matrix, quantised or not."""
  return x_TD @ weights.dequantize(w, x_TD.dtype)
