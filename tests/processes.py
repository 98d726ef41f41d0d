"""Commands: the environment of the processes that tests start, and a command's main in this process."""

import importlib.util
import os
import pathlib

import jax
from absl import flags

COMMANDS = pathlib.Path(__file__).resolve().parents[1] / 'moe/commands'


def environment() -> dict[str, str]:
  """As on a fresh machine, but with the tests' compilation cache and flags."""
  keep = {key: value for key, value in os.environ.items() if not key.startswith(('JAX_', 'RAY_'))}
  return keep | {
    'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': str(jax.config.jax_persistent_cache_min_compile_time_secs),
    'JAX_PLATFORMS': 'cpu',
  }


def script(name: str, *arguments) -> None:
  """Calls main of moe/commands/NAME.py in this process, with its 16 devices; mistakes are raised as UserError."""
  path = COMMANDS / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'script_{name}', path)
  module, known = importlib.util.module_from_spec(spec), set(flags.FLAGS)
  spec.loader.exec_module(module)
  try:
    module.main(flags.FLAGS([str(path), *map(str, arguments)]))
  finally:  # the next script declares the same flags
    for flag in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()
