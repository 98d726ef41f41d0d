"""What a config chooses by name: a file of a package is an entry, and the file's name is the entry's. No list has it.

    package                 what a file defines      chosen by
    moe.balance.rules       RULE                     balance.bias_rule
    moe.model.dispatch      apply                    dispatch
    moe.ops.grouped_matmul  BACKEND                  grouped_matmul
    moe.model.attention     ATTENTION                model.attention, for training
    moe.inference.attention ATTENTION                model.attention, for generation

A file whose name begins with an underscore serves the others. Names are known without importing anything.
"""

import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from moe.errors import UserError


class Registry(Mapping[str, Any]):
  """The entries of a package, each imported when it is first looked up.

  Args:
    package: dotted name of a folder of moe/.
    attribute: what each of its files defines.
  """

  def __init__(self, package: str, attribute: str):
    self.package, self.attribute = package, attribute
    self._added: dict[str, Any] = {}

  @functools.cached_property
  def _files(self) -> frozenset[str]:
    folder = pathlib.Path(__file__).parent.joinpath(*self.package.split('.')[1:])
    return frozenset(module.name for module in pkgutil.iter_modules([str(folder)]) if module.name[0] != '_')

  def __iter__(self) -> Iterator[str]:
    return iter(sorted({*self._files, *self._added}))

  def __len__(self) -> int:
    return len({*self._files, *self._added})

  def __contains__(self, name) -> bool:
    return name in self._files or name in self._added

  def __getitem__(self, name: str):
    if name in self._added:
      return self._added[name]
    if name not in self._files:
      raise KeyError(name)
    return getattr(importlib.import_module(f'{self.package}.{name}'), self.attribute)

  def add(self, name: str, entry: Any) -> None:
    """Makes `entry` known by a name of its own. Raises UserError if there is one of that name."""
    if name in self:
      raise UserError(f'{self.package} has an entry {name!r} already; its names are {", ".join(self)}')
    self._added[name] = entry


BIAS_RULES = Registry('moe.balance.rules', 'RULE')
DISPATCHERS = Registry('moe.model.dispatch', 'apply')
GROUPED_MATMULS = Registry('moe.ops.grouped_matmul', 'BACKEND')
ATTENTIONS = Registry('moe.model.attention', 'ATTENTION')
CACHED_ATTENTIONS = Registry('moe.inference.attention', 'ATTENTION')
