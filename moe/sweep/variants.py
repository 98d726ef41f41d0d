"""Variants: named sets of overrides of any setting of moe/config.py, and how lists of them are combined.

    product(axis('balance.gamma', [1e-3, 1e-2]), named({'mla': {}, 'mha': {'model.attention': 'mha', ...}}))

A list of variants is a plain list. The names of a product's factors are joined by commas: 'gamma=0.001,mla'.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe.config import Config, from_config_dict
from moe.errors import UserError

NAME = re.compile(r'[\w.=,+-]+', re.ASCII)  # what a folder may be called everywhere


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a run is called, and the settings that make it differ: {'balance.gamma': 0.01}."""

  name: str
  overrides: Mapping[str, Any]


def named(overrides_by_name: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
  """Variants with names of their own: {'sign': {'balance.bias_rule': 'sign'}, ...}."""
  return [Variant(name, dict(overrides)) for name, overrides in overrides_by_name.items()]


def axis(key: str, values: Iterable[Any]) -> list[Variant]:
  """One variant per value of a setting, called 'gamma=0.01' after the last part of its key."""
  return [Variant(f'{key.rpartition(".")[2]}={value}', {key: value}) for value in values]


def chain(*spaces: Sequence[Variant]) -> list[Variant]:
  """The variants of all lists, one list after the other."""
  return list(itertools.chain(*spaces))


def product(*spaces: Sequence[Variant]) -> list[Variant]:
  """Every combination of one variant of each list; the last list varies fastest.

  Raises:
    UserError: there is nothing to combine, or two lists override the same setting.
  """
  for number, space in enumerate(spaces, 1):
    if not space:
      raise UserError(f'factor {number} of a product of {len(spaces)} is empty: so is the product; give it a variant')
  if not spaces:
    raise UserError('a product of no factors is empty; give it a list of variants')
  return [_joined(parts) for parts in itertools.product(*spaces)]


def zipped(*spaces: Sequence[Variant]) -> list[Variant]:
  """The first variants of all lists as one, the second ones as one, and so on.

  Raises:
    UserError: the lists are empty or of different lengths, or two of them override the same setting.
  """
  lengths = [len(space) for space in spaces]
  if len(set(lengths)) != 1 or not lengths[0]:
    raise UserError(f'lists of {lengths} variants cannot be zipped; they must be equally long and not empty')
  return [_joined(parts) for parts in zip(*spaces, strict=True)]


def overlay(config: Config, overrides: Mapping[str, Any]) -> Config:
  """The config with `overrides`, {'section.key': value}, put over it, checked.

  Raises:
    UserError: an unknown key (the nearest valid one is named), a wrong type, or a combination that cannot run.
  """
  return from_config_dict(dataclasses.asdict(config), overrides)


def flatten(config: Config) -> dict[str, Any]:
  """Every setting by its full key: {'model.d_model': 128, ..., 'dispatch': 'auto'}."""
  flat: dict[str, Any] = {}
  for name, value in dataclasses.asdict(config).items():
    flat |= {f'{name}.{key}': inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
  return flat


def check_names(variants: Sequence[Variant]) -> None:
  """Raises UserError if there are no variants, two have the same name, or a name cannot be a folder's."""
  if not variants:
    raise UserError('the sweep has no variants; declare at least one')
  seen = set()
  for variant in variants:
    if not NAME.fullmatch(variant.name):
      raise UserError(f'variant name {variant.name!r} must consist of letters, digits and _ . = , + -')
    if variant.name in seen:
      raise UserError(f'two variants are called {variant.name!r}; give each a name of its own')
    seen.add(variant.name)


def _joined(parts: Sequence[Variant]) -> Variant:
  overrides: dict[str, Any] = {}
  for part in parts:
    for key in part.overrides:
      if key in overrides:
        raise UserError(f'variants {", ".join(p.name for p in parts)} both set {key!r}; a setting has one value a run')
    overrides |= part.overrides
  return Variant(','.join(part.name for part in parts), overrides)
