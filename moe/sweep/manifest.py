"""sweep.json: which sweep a results folder belongs to, which runs it has, and whether a command may go on with it."""

import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import moe
from moe.config import Config, from_config_dict
from moe.errors import UserError
from moe.files import open_own, read_json, sweep_temporaries, write_json
from moe.sweep.variants import Variant, check_names, flatten, overlay

FILE, LOCK = 'sweep.json', '.lock'
SEED = 'train.seed'
FREE = ('data.cache_dir',)  # settings that do not change a result


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Variants times seeds over one base config. The report compares every variant with the first."""

  name: str
  scale: str
  base: Config
  variants: tuple[Variant, ...]
  seeds: tuple[int, ...]

  @property
  def runs(self) -> list['RunOf']:
    """All runs, seed by seed, so that a sweep cut short has compared every variant on the seeds it got to."""
    return [
      RunOf(variant.name, seed, overlay(self.base, {**variant.overrides, SEED: seed}))
      for seed in self.seeds
      for variant in self.variants
    ]


@dataclasses.dataclass(frozen=True)
class RunOf:
  """One run of a sweep."""

  variant: str
  seed: int
  config: Config

  @property
  def folder(self) -> str:
    return f'{self.variant},seed={self.seed}'


def make(name: str, scale: str, base: Config, variants: Sequence[Variant], seeds: Sequence[int]) -> Sweep:
  """A checked sweep.

  Args:
    name, scale: what it is called, and at which size it runs.
    base: config that variants change.
    variants: the first is what others are compared with.
    seeds: of each variant, a run each: train.seed.

  Raises:
    UserError: no variants or seeds, names that are taken twice, a seed within a variant, or a variant that cannot run.
  """
  check_names(variants)
  if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
    raise UserError(f'seeds {list(seeds)} must be one or more different integers, 0 or above')
  for variant in variants:
    if SEED in variant.overrides:
      raise UserError(f'variant {variant.name!r} sets {SEED}; seeds are an axis of their own, --seeds=0,1,2')
    try:
      overlay(base, variant.overrides)
    except UserError as error:
      raise UserError(f'variant {variant.name!r}: {error}') from error
  return Sweep(name, scale, base, tuple(variants), tuple(seeds))


def open_folder(folder: pathlib.Path, sweep: Sweep) -> Sweep:
  """Writes sweep.json, or checks that `sweep` may go on in this folder; new variants and seeds are added.

  Returns:
    The sweep with the variants and seeds that the folder has had so far in front.

  Raises:
    UserError: the folder holds something else, another sweep, one of another version or with other settings.
  """
  if folder.exists() and not folder.is_dir():
    raise UserError(f'workdir {folder} is a file; choose a folder')
  foreign = UserError(f'workdir {folder} holds files but no {FILE}, so it is not of a sweep; choose another --workdir')
  try:
    names = {file.name for file in folder.iterdir()} if folder.exists() else set()
    if names and not names & {FILE, LOCK}:  # with the lock and no sweep.json, another command may be writing just now
      raise foreign
    folder.mkdir(parents=True, exist_ok=True)
    lock = open_own(folder / LOCK)
  except OSError as error:
    raise UserError(f'cannot write to workdir {folder}: {error.strerror}') from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # two commands that add to the folder take turns
    if (folder / FILE).exists():
      sweep = merge(folder, read(folder), sweep)
    else:
      sweep_temporaries(folder)  # of a command that was killed while it wrote the first sweep.json
      if any(file.name != LOCK for file in folder.iterdir()):
        raise foreign
    _write(folder, sweep)
  return sweep


def _write(folder: pathlib.Path, sweep: Sweep):
  write_json(folder / FILE, describe(sweep))


def describe(sweep: Sweep) -> dict[str, Any]:
  """The sweep as sweep.json has it; `parse` reads it."""
  return {
    'version': moe.__version__,
    'sweep': sweep.name,
    'scale': sweep.scale,
    'seeds': sweep.seeds,
    'variants': {variant.name: variant.overrides for variant in sweep.variants},
    'base': dataclasses.asdict(sweep.base),
  }


def read(folder: pathlib.Path) -> Sweep:
  """The sweep of a results folder. Raises UserError: no folder of a sweep, damaged, or of another version."""
  file = folder / FILE
  if not os.path.lexists(file):
    raise UserError(f'{folder} is no results folder of a sweep: there is no {FILE} in it')
  try:
    found = read_json(file)
  except UserError as error:
    raise UserError(f'{file} is damaged or not of a sweep: {error}; choose another --workdir') from error
  return parse(found, file)


def parse(found: dict[str, Any], file: pathlib.Path) -> Sweep:
  """The sweep that a file describes. Raises UserError: no sweep, or of another version."""
  try:
    version = found['version']
  except KeyError as error:
    raise UserError(f'{file} is damaged or not of a sweep: {error}; choose another --workdir') from error
  if version != moe.__version__:
    raise UserError(
      f'{file.parent} was swept by version {version}, this is {moe.__version__}; choose another --workdir'
    )
  try:
    base = from_config_dict(found['base'])
    variants = [Variant(name, overrides) for name, overrides in found['variants'].items()]
    return make(found['sweep'], found['scale'], base, variants, found['seeds'])
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UserError(f'{file} is damaged: {error!r}; choose another --workdir') from error


def merge(folder: pathlib.Path, old: Sweep, new: Sweep) -> Sweep:
  """What `folder` has of a sweep, and behind it the variants and seeds that `new` adds.

  Raises:
    UserError: another sweep, or other settings.
  """
  if (old.name, old.scale) != (new.name, new.scale):
    raise UserError(
      f'{folder} holds the sweep {old.name!r} at scale {old.scale!r}, not {new.name!r} at {new.scale!r}; '
      'choose another --workdir'
    )
  _check_equal(folder, flatten(old.base), flatten(new.base), '')
  before = {variant.name: variant for variant in old.variants}
  for variant in new.variants:
    if variant.name in before:
      _check_equal(folder, before[variant.name].overrides, variant.overrides, f'in variant {variant.name!r} ')
  added = [variant for variant in new.variants if variant.name not in before]
  seeds = dict.fromkeys((*old.seeds, *new.seeds))
  return dataclasses.replace(new, variants=(*old.variants, *added), seeds=tuple(seeds))


def _check_equal(folder, old, new, where):
  for key in sorted(old.keys() | new.keys()):
    if key not in FREE and old.get(key) != new.get(key):
      raise UserError(
        f'{folder} was swept with {where}{key} = {old.get(key)!r}, not {new.get(key)!r}; choose another --workdir'
      )
