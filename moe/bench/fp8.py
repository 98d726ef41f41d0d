"""The forward product of the FP8 grouped matmul, on operands that are quantised already, and quantising them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.bench import timing
from moe.bench.gemm import Shape, uneven_sizes
from moe.ops import fp8


def measure(shape: Shape, backend: str, repeats: int, inner: int) -> list[dict]:
  """A row per contender: ours, torch's with a scale per row where torch sees a GPU, and quantising both operands."""
  timing.say(f'fp8 {"x".join(map(str, shape))}')
  M, D, F, E = shape
  size_e = uneven_sizes(shape)
  keys = jax.random.split(jax.random.key(0))
  x_MD = jax.random.normal(keys[0], (M, D), jnp.bfloat16)
  w_eDF = jax.random.normal(keys[1], (E, D, F), jnp.bfloat16)
  quantize = jax.jit(lambda x: fp8.quantize_rows(x, backend))
  quantize_matrices = jax.jit(lambda w: fp8.quantize_matrices(w, backend))
  x, (w, laid_out) = quantize(x_MD), quantize_matrices(w_eDF)
  run = jax.jit(lambda x, w: fp8.product(x, w, jnp.asarray(size_e), backend, jnp.bfloat16)).lower(x, laid_out).compile()
  errors = check(run(x, laid_out), x, w, x_MD, w_eDF, size_e)
  calls = {
    f'fp8 {backend}': functools.partial(run, x, laid_out),
    'quantize rows': functools.partial(quantize, x_MD),
    'quantize matrices': functools.partial(quantize_matrices, w_eDF),
  }
  if timing.torch():
    calls['torch _scaled_grouped_mm'] = torch_product(shape, size_e)
  times_s = timing.median_s(calls, repeats, inner)
  tflop = 2 * int(size_e.sum()) * D * F / 1e12
  # Read in bf16; written in FP8 with scales, matrices in both orientations.
  moved_gb = {'quantize rows': M * D * (2 + 1 + 4 / fp8.BLOCK) / 1e9, 'quantize matrices': E * D * F * (2 + 2) / 1e9}
  rows = []
  for name, s in times_s.items():
    rate = {'gb_per_s': moved_gb[name] / s} if name in moved_gb else {'tflop_per_s': tflop / s}
    rows.append({'shape': 'x'.join(map(str, shape)), 'name': name, 's': s, **rate})
  rows[0] |= errors | {'kernels': timing.kernels(run)}
  return rows


def check(y_MF, x, w, x_MD, w_eDF, size_e) -> dict:
  """Errors of the middle expert's rows: of rounding the result, and of FP8. AssertionError if they are too large."""
  e = len(size_e) // 2
  rows = slice(int(size_e[:e].sum()), int(size_e[: e + 1].sum()))
  as_float64 = lambda a: np.asarray(a, np.float64)
  got, exact = as_float64(y_MF[rows]), as_float64(x_MD[rows]) @ as_float64(w_eDF[e])
  of_rows = fp8.dequantize(fp8.Quantized(x.value[rows], x.scale[rows]), fp8.ROWS)
  of_expert = fp8.dequantize(fp8.Quantized(w.value[e], w.scale[e]), fp8.BLOCKS)
  rounded = as_float64(of_rows) @ as_float64(of_expert)
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
