"""From what a command line says to a checked sweep: names of sweep and scale, settings, seeds, a choice of variants."""

import fnmatch
import math
import pathlib
from collections.abc import Sequence

from moe.config import SECTIONS, Config, parse_setting, parsed
from moe.errors import UserError
from moe.files.paths import local_path, run_python, users_code
from moe.sweep import manifest
from moe.sweep.variants import Variant, axis, overlay, product

DECLARED = 'configs/sweeps/declared.py'
DEFAULT = 'balance'  # the sweep, where neither one nor a grid is named
GRID = 'grid'  # what a sweep of a grid alone is called
MOST_VARIANTS = 10_000


def load(
  definitions: str,
  name: str | None,
  scale: str,
  settings: Sequence[str],
  seeds: Sequence[str],
  grid: Sequence[str] = (),
) -> manifest.Sweep:
  """The sweep called `name` at `scale`, or a grid, or each variant of the sweep at each place of the grid.

  Args:
    definitions: a Python file with the tables SWEEPS and SCALES (see configs/sweeps/declared.py).
    name: None: the grid alone, or without one DEFAULT.
    scale: of SCALES: how large the model is, and how long it trains.
    settings: 'key=value', put over the scale's config.
    seeds: integers, as text.
    grid: 'key=value,value' each; every combination is a variant.

  Raises:
    UserError: no such file, sweep or scale, one that raises or makes something else, a bad setting, grid or seed, or a
      sweep that cannot run.
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
  factors = _grid(grid, settings)
  if name or not factors:
    factors.insert(0, _declared(tables, name or DEFAULT, path))
  if (count := math.prod(map(len, factors))) > MOST_VARIANTS:
    raise UserError(f'the sweep has {count:,} variants; at most {MOST_VARIANTS:,} are run')
  variants = product(*factors) if grid else factors[0]
  return manifest.make(name or (GRID if grid else DEFAULT), scale, base, variants, [_seed(text) for text in seeds])


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
    flag = {'SWEEPS': '--sweep', 'SCALES': '--scale'}[table]
    names = ', '.join(str(key) for key, maker in makers.items() if callable(maker))
    valid = f'one of {names}' if names else f'a function in the table {table}, which has none'
    raise UserError(f'{flag} = {name!r} must be {valid}')
  with users_code(path, '--definitions'):
    return makers[name]()


def _declared(tables: dict, name: str, path: pathlib.Path) -> list[Variant]:
  variants = _made(tables, 'SWEEPS', name, path)
  if not (isinstance(variants, list) and all(isinstance(variant, Variant) for variant in variants)):
    raise UserError(f'sweep {name!r} of --definitions = {str(path)!r} makes no list of variants; see {DECLARED}')
  return variants


def _set(base: Config, setting: str) -> Config:
  """The config with one 'key=value', as --config.key=value would set it; the value may hold commas."""
  try:
    return overlay(base, dict([parse_setting(setting)]))
  except UserError as error:
    raise UserError(f'--set = {setting!r}: {error}') from error


def _grid(grid: Sequence[str], settings: Sequence[str]) -> list[list[Variant]]:
  """A list of variants for each 'key=value,value'."""
  taken, factors = {setting.partition('=')[0]: '--set' for setting in settings}, []
  for given in grid:
    key, equals, texts = given.partition('=')
    if not equals or key in SECTIONS:
      raise UserError(f'--grid = {given!r} must look like train.batch_size=8,16')
    if key in taken:
      raise UserError(f'--grid = {given!r}: {taken[key]} sets {key} already')
    try:
      values = [parse_setting(f'{key}={text}')[1] for text in texts.split(',')]
    except UserError as error:
      raise UserError(f'--grid = {given!r}: {error}') from error
    if twice := [value for value in values if values.count(value) > 1]:
      raise UserError(f'--grid = {given!r} has {twice[0]} twice')
    taken[key] = 'another --grid'
    factors.append(axis(key, values))
  return factors


def _seed(text: str) -> int:
  try:
    return parsed('train.seed', text)
  except UserError as error:
    raise UserError(f'--seeds = {text!r} must be integers, 0 or above, separated by commas') from error
