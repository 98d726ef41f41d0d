"""Grouped matmul backends beside one dense matmul of the same FLOPs and, on a GPU, torch's grouped_mm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.bench import timing
from moe.ops.grouped_matmul import grouped_matmul
from moe.registry import GROUPED_MATMULS

PRODUCTS = ('forward', 'dx', 'dw')


class Shape(NamedTuple):
  """M rows of width D, to F, in E groups."""

  M: int
  D: int
  F: int
  E: int


CPU_SHAPES = (Shape(16384, 256, 128, 64),)
# V3's two products on a node of 16 experts each, and two models of smaller experts.
GPU_SHAPES = (
  Shape(32768, 7168, 4096, 16),
  Shape(32768, 2048, 7168, 16),
  Shape(65536, 2048, 2048, 64),
  Shape(131072, 1024, 1024, 64),
)


def measure(shape: Shape, backends, dtype, repeats: int, inner: int) -> list[dict]:
  """A row per contender, with seconds and TFLOP/s of the forward product and both gradients.

  Args:
    shape: of the grouped product, M rows [M, D] by E matrices [D, F].
    backends: names in `moe.ops.grouped_matmul`.
    dtype: of all operands.
    repeats, inner: as of `timing.median_s`.
  """
  timing.say(f'gemm {"x".join(map(str, shape))}')
  M, D, F, E = shape
  size_e = uneven_sizes(shape)
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, dy = (jax.random.normal(key, dims, dtype) for key, dims in zip(keys, ((M, D), (E, D, F), (M, F)), strict=True))
  contenders = {'dense': products(jnp.matmul, x, w[0], dy)}
  for name in backends:
    multiple = GROUPED_MATMULS[name].row_multiple
    run = functools.partial(grouped_matmul, size_e=jnp.asarray(size_e), backend=name, row_multiple=multiple)
    contenders[name] = products(run, x, w, dy)
    check(contenders[name], np.asarray(size_e), x, w, dy)
  found = {name: [timing.kernels(call[0]) for call in calls.values()] for name, calls in contenders.items()}
  calls = {
    (name, product): functools.partial(call[0], *call[1:])
    for name, made in contenders.items()
    for product, call in made.items()
  }
  if timing.torch() and dtype == jnp.bfloat16:
    calls |= {('torch grouped_mm', product): call for product, call in torch_products(shape, size_e).items()}
  times_s = timing.median_s(calls, repeats, inner)
  rows: list[dict[str, Any]] = []
  for name in dict.fromkeys(name for name, _ in calls):
    taken_s = [times_s[name, product] for product in PRODUCTS]
    flops = 2 * (M if name == 'dense' else int(size_e.sum())) * D * F
    row: dict[str, Any] = {
      'shape': 'x'.join(map(str, shape)),
      'name': name,
      's': sum(taken_s),
      'tflop_per_s': 3 * flops / sum(taken_s) / 1e12,
    }
    row |= {f'{product}_tflop_per_s': flops / s / 1e12 for product, s in zip(PRODUCTS, taken_s, strict=True)}
    rows.append(row | {'kernels': found.get(name, ['torch'] * 3)})
  for row in rows:
    row['of_dense'] = row['tflop_per_s'] / rows[0]['tflop_per_s']
  return rows


def uneven_sizes(shape: Shape) -> np.ndarray:
  """Rows per group that differ by up to 30% from the mean, multiples of 8, as every kernel here wants them."""
  weights = np.random.default_rng(0).uniform(0.7, 1.3, shape.E)
  return (weights / weights.sum() * shape.M).astype(np.int32) // 8 * 8


def products(product, x, w, dy) -> dict:
  """name -> (compiled function, its arguments) of y = product(x, w) and of its gradients.

  Args:
    product: the function that is measured.
    x: rows [M, D].
    w: matrices [E, D, F], or one, [D, F].
    dy: the gradient that comes back, [M, F].
  """
  forward = jax.jit(product)
  dx = jax.jit(lambda x, w, dy: jax.vjp(lambda x: product(x, w), x)[1](dy)[0])
  dw = jax.jit(lambda x, w, dy: jax.vjp(lambda w: product(x, w), w)[1](dy)[0])
  made = zip(PRODUCTS, (forward, dx, dw), ((x, w), (x, w, dy), (x, w, dy)), strict=True)
  return {name: (function.lower(*arguments).compile(), *arguments) for name, function, arguments in made}


def check(calls: dict, size_e, x, w, dy) -> None:
  """Compares the first, middle and last expert with float32 products; raises AssertionError.

  Args:
    calls: of `products`.
    size_e: rows per expert, on the host.
    x, w, dy: what `products` was given, [M, D], [E, D, F] and [M, F].
  """
  y, dx, dw = (function(*arguments) for function, *arguments in calls.values())
  tolerance = 2**-7 if x.dtype == jnp.bfloat16 else 1e-4
  for e in {0, len(size_e) // 2, len(size_e) - 1}:
    rows = slice(int(size_e[:e].sum()), int(size_e[: e + 1].sum()))
    x_e, w_e, dy_e = (np.asarray(a, np.float32) for a in (x[rows], w[e], dy[rows]))
    for got, want in ((y[rows], x_e @ w_e), (dx[rows], dy_e @ w_e.T), (dw[e], x_e.T @ dy_e)):
      np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def torch_products(shape: Shape, size_e) -> dict:
  """The same three products by torch's grouped_mm."""
  torch = timing.torch()
  M, D, F, E = shape
  make = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
  x, w, dy = make(M, D), make(E, D, F), make(M, F)
  end_e = torch.tensor(np.cumsum(size_e), device='cuda', dtype=torch.int32)
  used = int(size_e.sum())
  multiply = torch.nn.functional.grouped_mm if hasattr(torch.nn.functional, 'grouped_mm') else torch._grouped_mm
  return {
    'forward': lambda: multiply(x[:used], w, offs=end_e),
    'dx': lambda: multiply(dy[:used], w.transpose(1, 2), offs=end_e),
    'dw': lambda: multiply(x[:used].t(), dy[:used], offs=end_e),
  }
