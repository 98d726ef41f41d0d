"""Scripts from outside: the environment of the processes that tests start."""

import os

import jax


def environment() -> dict[str, str]:
  """As on a fresh machine, but with the tests' compilation cache and flags."""
  keep = {key: value for key, value in os.environ.items() if not key.startswith(('JAX_', 'RAY_'))}
  return keep | {'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir), 'JAX_PLATFORMS': 'cpu'}
