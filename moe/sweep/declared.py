"""From what a command line says to a checked sweep: names of sweep and scale, settings, seeds, a choice of variants."""

import fnmatch
import runpy
from collections.abc import Sequence

from moe.config import Config
from moe.errors import UserError
from moe.sweep import manifest
from moe.sweep.variants import check_key, flatten, overlay


def load(definitions: str, name: str, scale: str, settings: Sequence[str], seeds: Sequence[str]) -> manifest.Sweep:
  """The sweep called `name` at `scale`.

  Args:
    definitions: a Python file with the tables SWEEPS and SCALES (see configs/sweeps/declared.py).
    settings: 'key=value', put over the scale's config.
    seeds: integers, as text.

  Raises:
    UserError: no such file, sweep or scale, a bad setting or seed, or a sweep that cannot run.
  """
  try:
    tables = runpy.run_path(definitions)
  except OSError as error:
    raise UserError(f'cannot read --definitions = {definitions!r}: {error.strerror}') from error
  except (ImportError, SyntaxError) as error:  # ImportError: a folder
    raise UserError(f'--definitions = {definitions!r} is no Python file that runs: {error}') from error
  if missing := [table for table in ('SWEEPS', 'SCALES') if table not in tables]:
    raise UserError(f'--definitions = {definitions!r} has no table {missing[0]!r}; see configs/sweeps/declared.py')
  sweeps, scales = tables['SWEEPS'], tables['SCALES']
  for flag, value, table in (('--sweep', name, sweeps), ('--scale', scale, scales)):
    if value not in table:
      raise UserError(f'{flag} = {value!r} must be one of {", ".join(table)}')
  base = scales[scale]()
  for setting in settings:
    base = _set(base, setting)
  return manifest.make(name, scale, base, sweeps[name](), [_seed(text) for text in seeds])


def select(sweep: manifest.Sweep, patterns: Sequence[str]) -> set[str]:
  """Names of the variants that match any of the patterns (`fnmatch`); of all without patterns.

  Args:
    patterns: pieces between commas. Names may hold commas, too: of the next pieces, as many as match together are one
      pattern.

  Raises:
    UserError: a pattern matches no variant.
  """
  names = [variant.name for variant in sweep.variants]
  selected, rest = set(), list(patterns)
  while rest:
    for count in range(len(rest), 0, -1):
      if found := fnmatch.filter(names, ','.join(rest[:count])):
        break
    else:
      raise UserError(f'--only = {rest[0]!r} matches no variant of {sweep.name!r}; they are {"; ".join(names)}')
    selected.update(found)
    rest = rest[count:]
  return selected or set(names)


def _set(base: Config, setting: str) -> Config:
  """The config with one 'key=value', as --config.key=value would set it; the value may hold commas."""
  key, equals, text = setting.partition('=')
  check_key(base, key)
  kind = type(flatten(base)[key])
  try:
    value = {'true': True, 'false': False}[text] if kind is bool else kind(text)
  except (KeyError, ValueError):
    equals = ''
  if not equals:
    raise UserError(f'--set = {setting!r} must be {key}= and a value of type {kind.__name__}')
  return overlay(base, {key: value})


def _seed(text: str) -> int:
  if not text.isdecimal():
    raise UserError(f'--seeds = {text!r} must be integers, 0 or above, separated by commas')
  return int(text)
