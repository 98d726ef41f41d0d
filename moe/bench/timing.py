"""Timing calls side by side, and saying which kernels they got and how much memory they take."""

import functools
import re
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

GIB = 2**30
Name = TypeVar('Name', bound=Hashable)


def median_s(calls: Mapping[Name, Callable], repeats: int, inner: int = 1) -> dict[Name, float]:
  """Median seconds of each call, after a warm-up; taken in turn, so that all meet the same noise.

  Args:
    calls: functions without arguments, whose result `synchronize` can wait for.
    repeats: rounds.
    inner: calls per measurement; more than 1 hides the launch behind the work of the call before, as in a train step.
  """
  times: dict[Name, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    synchronize(call())
  for _ in range(repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      for _ in range(inner):
        result = call()
      synchronize(result)
      times[name].append((time.perf_counter() - start) / inner)
  return {name: float(np.median(taken)) for name, taken in times.items()}


def synchronize(result) -> None:
  """Waits for jax arrays, or for all of CUDA's work if `result` is of torch."""
  leaves = jax.tree.leaves(result)
  if any(type(leaf).__module__.startswith('torch') for leaf in leaves):
    if any(leaf.is_cuda for leaf in leaves):
      torch().cuda.synchronize()
  else:
    jax.block_until_ready(result)


def torch():
  """The module torch if it is installed and sees a GPU, else None."""
  try:
    import torch
  except ImportError:
    return None
  return torch if torch.cuda.is_available() else None


def dense_tflop_per_s(size: int, dtype, repeats: int, inner: int) -> float:
  """Rate of one dense product of `size` cubed: what the machine reaches in this run.

  Args:
    size: rows and columns of both matrices.
    dtype: of theirs.
    repeats, inner: as of `median_s`.
  """
  say(f'dense {size}^3, {jnp.dtype(dtype).name}')
  x, w = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
  run = jax.jit(jnp.matmul)
  return 2 * size**3 / median_s({'': functools.partial(run, x, w)}, repeats, inner)[''] / 1e12


def kernels(compiled) -> str:
  """What does the matrix products of a compiled function, and how often: so that a dense expansion cannot hide."""
  text = compiled.as_text()
  found = re.findall(r'custom_call_target="([\w$.]*(?:mosaic_gpu|cublas|gemm|cudnn|triton)[\w$.]*)"', text)
  found += [f'__{kind}' for kind in re.findall(r'"kind":"(__\w*triton\w*)"', text)]
  found += ['dot'] * len(re.findall(r' dot\(', text)) + ['while'] * len(re.findall(r' while\(', text))
  return ', '.join(f'{name} x{found.count(name)}' for name in dict.fromkeys(found)) or 'fused loops'


def memory(compiled) -> dict:
  """A row's entries on the memory of a compiled function."""
  found = compiled.memory_analysis()
  size = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
  return {
    'peak_gib': (size - found.alias_size_in_bytes) / GIB,
    'peak_by': 'XLA: arguments, results, temporaries',
  }


def say(text: str) -> None:
  """Progress, on stderr: shows which phase is stuck."""
  print(f'[{time.strftime("%H:%M:%S")}] {text}', file=sys.stderr, flush=True)
