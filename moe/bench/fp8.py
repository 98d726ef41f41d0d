"""FP8 grouped matmuls on operands that are quantised already, forward and weight gradient, and quantising them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.bench import timing
from moe.bench.gemm import Shape, uneven_sizes
from moe.ops import fp8
from moe.ops.quantize_gpu import Blocks, blocks_of


def measure(shape: Shape, backend: str, repeats: int, inner: int) -> list[dict]:
  """A row per contender: ours, torch's with a scale per row where torch sees a GPU, and quantising the operands.

  Args:
    shape: of the grouped product, M rows [M, D] by E matrices [D, F].
    backend: of `moe.ops.grouped_matmul`, of our products.
    repeats, inner: as of `timing.median_s`.
  """
  timing.say(f'fp8 {"x".join(map(str, shape))}')
  M, D, F, E = shape
  size_e = uneven_sizes(shape)
  keys = jax.random.split(jax.random.key(0), 3)
  x_MD = jax.random.normal(keys[0], (M, D), jnp.bfloat16)
  w_eDF = jax.random.normal(keys[1], (E, D, F), jnp.bfloat16)
  dy_MF = jax.random.normal(keys[2], (M, F), jnp.bfloat16)
  quantize = jax.jit(lambda x: fp8.quantize_rows(x, backend, power_of_two=True))
  quantize_matrices = jax.jit(lambda w: fp8.quantize_matrices(w, backend))
  x, (w, laid_out) = quantize(x_MD), quantize_matrices(w_eDF)
  run = jax.jit(lambda x, w: fp8.product(x, w, jnp.asarray(size_e), backend, jnp.bfloat16)).lower(x, laid_out).compile()
  errors = check(run(x, laid_out), x, w, x_MD, w_eDF, size_e)
  blocks = blocks_of(jnp.asarray(size_e), M)
  turn = jax.jit(lambda x: fp8.turn(x, blocks, backend))
  both_ways = jax.jit(lambda dy: fp8.quantize_both_ways(dy, blocks, backend))
  turned = turn(x), both_ways(dy_MF)[1]
  wgrad = jax.jit(lambda x, dy: fp8.product_of_turned(x, dy, blocks, backend, jnp.bfloat16)).lower(*turned).compile()
  wgrad_errors = check_wgrad(wgrad(*turned), *turned, blocks, x_MD, dy_MF, size_e)
  calls = {
    f'fp8 {backend}': functools.partial(run, x, laid_out),
    f'fp8 {backend} dw': functools.partial(wgrad, *turned),
    'quantize rows': functools.partial(quantize, x_MD),
    'quantize rows both ways': functools.partial(both_ways, dy_MF),
    'turn rows': functools.partial(turn, x),
    'quantize matrices': functools.partial(quantize_matrices, w_eDF),
  }
  if timing.torch():
    calls['torch _scaled_grouped_mm'] = torch_product(shape, size_e)
  times_s = timing.median_s(calls, repeats, inner)
  tflop = 2 * int(size_e.sum()) * D * F / 1e12
  scale_bytes = 4 / fp8.BLOCK  # per value
  # Read in bf16, or FP8 with scales to be turned; written in FP8 with scales, once or both ways round.
  moved_gb = {
    'quantize rows': M * D * (2 + 1 + scale_bytes) / 1e9,
    'quantize rows both ways': M * F * (2 + 2 * (1 + scale_bytes)) / 1e9,
    'turn rows': M * D * 2 * (1 + scale_bytes) / 1e9,
    'quantize matrices': E * D * F * (2 + 2) / 1e9,
  }
  rows = []
  for name, s in times_s.items():
    if name in moved_gb:
      rate = {'gb_per_s': moved_gb[name] / s}
    else:
      rate = {'dw_tflop_per_s' if name.endswith(' dw') else 'tflop_per_s': tflop / s}
    rows.append({'shape': 'x'.join(map(str, shape)), 'name': name, 's': s, **rate})
  rows[0] |= errors | {'kernels': timing.kernels(run)}
  rows[1] |= wgrad_errors | {'kernels': timing.kernels(wgrad)}
  return rows


def check(y_MF, x, w, x_MD, w_eDF, size_e) -> dict:
  """Errors of the middle expert's rows, see `errors_of`.

  Args:
    y_MF: the product, of quantised operands.
    x, w: those operands, in blocks ROWS [M, D] and BLOCKS [e, D, F].
    x_MD, w_eDF: what they were quantised from.
    size_e: rows per expert, on the host.
  """
  e = len(size_e) // 2
  rows = slice(int(size_e[:e].sum()), int(size_e[: e + 1].sum()))
  of_rows = fp8.dequantize(fp8.Quantized(x.value[rows], x.scale[rows]), fp8.ROWS)
  of_expert = fp8.dequantize(fp8.Quantized(w.value[e], w.scale[e]), fp8.BLOCKS)
  return errors_of(y_MF[rows], of_rows, of_expert, x_MD[rows], w_eDF[e])


def check_wgrad(dw_eDF, x, dy, blocks: Blocks, x_MD, dy_MF, size_e) -> dict:
  """Errors of the middle expert's weight gradient, see `errors_of`.

  Args:
    dw_eDF: the gradient, of quantised operands.
    x, dy: those operands as `fp8.turn` makes them, [D, tokens] and [F, tokens].
    blocks: of their tokens.
    x_MD, dy_MF: what they were quantised from.
    size_e: rows per expert, on the host.
  """
  e = len(size_e) // 2
  rows = slice(int(size_e[:e].sum()), int(size_e[: e + 1].sum()))
  mine = slice(int(blocks.first_e[e]), int(blocks.first_e[e] + blocks.count_e[e]))
  tokens = slice(mine.start * fp8.BLOCK, mine.stop * fp8.BLOCK)
  of_blocks = [fp8.dequantize(fp8.Quantized(a.value[:, tokens].T, a.scale[mine]), fp8.COLUMNS) for a in (x, dy)]
  return errors_of(dw_eDF[e], of_blocks[0].T, of_blocks[1], x_MD[rows].T, dy_MF[rows])


def errors_of(got, a, b, exact_a, exact_b) -> dict:
  """Errors of a product: of rounding the result of a b, and of FP8. AssertionError if they are too large.

  Args:
    got: the measured result, [m, n].
    a, b: the operands as they were multiplied, dequantised: [m, k] and [k, n].
    exact_a, exact_b: the same before they were quantised.
  """
  got, a, b, exact_a, exact_b = (np.asarray(array, np.float64) for array in (got, a, b, exact_a, exact_b))
  rounded, exact = a @ b, exact_a @ exact_b
  error = np.linalg.norm(got - rounded) / np.linalg.norm(rounded)
  distance = 1 - 2 * (got * exact).sum() / ((got**2).sum() + (exact**2).sum())
  assert error < 2e-3, error
  assert distance < 1e-3, distance
  return {'error_to_dequantized': float(error), 'distance_to_unquantized': float(distance)}


def torch_product(shape: Shape, size_e):
  """torch's grouped FP8 product, with a scale per row and column."""
  torch = timing.torch()
  M, D, F, E = shape
  make = lambda *dims: torch.randn(*dims, device='cuda', dtype=torch.bfloat16).to(torch.float8_e4m3fn)
  x, w = make(M, D), make(E, F, D)
  scale_x, scale_w = torch.ones(int(size_e.sum()), device='cuda'), torch.ones(E, F, device='cuda')
  end_e = torch.tensor(np.cumsum(size_e), device='cuda', dtype=torch.int32)
  used = x[: int(size_e.sum())]
  return lambda: torch._scaled_grouped_mm(
    used, w.transpose(1, 2), scale_x, scale_w, offs=end_e, out_dtype=torch.bfloat16, use_fast_accum=True
  )
