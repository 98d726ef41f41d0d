"""From what a command line says to a checked sweep: names of sweep and scale, settings, seeds, a choice of variants."""

import fnmatch
import pathlib
from collections.abc import Sequence

from moe.config import Config, parse_setting, parsed
from moe.errors import UserError
from moe.files.paths import local_path, run_python, users_code
from moe.sweep import manifest
from moe.sweep.variants import Variant, overlay

DECLARED = 'configs/sweeps/declared.py'


def load(definitions: str, name: str, scale: str, settings: Sequence[str], seeds: Sequence[str]) -> manifest.Sweep:
  """The sweep called `name` at `scale`.

  Args:
    definitions: a Python file with the tables SWEEPS and SCALES (see configs/sweeps/declared.py).
    settings: 'key=value', put over the scale's config.
    seeds: integers, as text.

  Raises:
    UserError: no such file, sweep or scale, one that raises or makes something else, a bad setting or seed, or a sweep
      that cannot run.
  """
  path = local_path(definitions, '--definitions')
  tables = run_python(path, '--definitions')
  for table in ('SWEEPS', 'SCALES'):
    if not isinstance(tables.get(table), dict):
      raise UserError(f'--definitions = {definitions!r} has no table {table!r}; see {DECLARED}')
  base = _made(tables, 'SCALES', scale, path)
  if not isinstance(base, Config):
    raise UserError(f'scale {scale!r} of --definitions = {definitions!r} makes {type(base).__name__}, not a Config')
  for setting in settings:
    base = _set(base, setting)
  variants = _made(tables, 'SWEEPS', name, path)
  if not (isinstance(variants, list) and all(isinstance(variant, Variant) for variant in variants)):
    raise UserError(f'sweep {name!r} of --definitions = {definitions!r} makes no list of variants; see {DECLARED}')
  return manifest.make(name, scale, base, variants, [_seed(text) for text in seeds])


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


def _made(tables: dict, table: str, name: str, path: pathlib.Path):
  """What the function called `name` in a table of the definitions makes."""
  makers = tables[table]
  if not callable(makers.get(name)):
    flag, names = {'SWEEPS': '--sweep', 'SCALES': '--scale'}[table], ', '.join(map(str, makers))
    raise UserError(f'{flag} = {name!r} must be one of {names}, each a function')
  with users_code(path, '--definitions'):
    return makers[name]()


def _set(base: Config, setting: str) -> Config:
  """The config with one 'key=value', as --config.key=value would set it; the value may hold commas."""
  try:
    return overlay(base, dict([parse_setting(setting)]))
  except UserError as error:
    raise UserError(f'--set = {setting!r}: {error}') from error


def _seed(text: str) -> int:
  try:
    return parsed('train.seed', text)
  except UserError as error:
    raise UserError(f'--seeds = {text!r} must be integers, 0 or above, separated by commas') from error
