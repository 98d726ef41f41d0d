"""What a config chooses by name: a file of a package is an entry, and the file's name is the entry's. No list has it.

    package                 what a file defines            chosen by
    moe.balance.rules       RULE, a Rule                   balance.bias_rule
    moe.model.dispatch      apply, a function              dispatch
    moe.ops.grouped_matmul  BACKEND, a Backend             grouped_matmul
    moe.model.attention     ATTENTION, an Attention        model.attention, for training
    moe.inference.attention ATTENTION, a CachedAttention   model.attention, for generation

A file whose name begins with an underscore serves the others. Names are known without importing anything.
"""

import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from moe.plugins import Registry


class Folder(Mapping[str, Any]):
  """What the files of a package define, each imported when it is first looked up.

  Args:
    package: dotted name of a folder of moe/.
    attribute: what each of its files defines.
  """

  def __init__(self, package: str, attribute: str):
    self.package, self.attribute = package, attribute

  @functools.cached_property
  def _names(self) -> tuple[str, ...]:
    folder = pathlib.Path(__file__).parent.joinpath(*self.package.split('.')[1:])
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if module.name[0] != '_'))

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  def __contains__(self, name) -> bool:
    return name in self._names

  def __getitem__(self, name: str):
    if name not in self._names:
      raise KeyError(name)
    return getattr(importlib.import_module(f'{self.package}.{name}'), self.attribute)


AUTO = ('auto',)  # what a config says for whichever is fastest
BIAS_RULES = Registry('bias rule', 'moe.balance.rules.Rule', Folder('moe.balance.rules', 'RULE'))
DISPATCHERS = Registry('dispatcher', 'collections.abc.Callable', Folder('moe.model.dispatch', 'apply'), AUTO)
GROUPED_MATMULS = Registry(
  'grouped matmul', 'moe.ops.grouped_matmul.Backend', Folder('moe.ops.grouped_matmul', 'BACKEND'), AUTO
)
ATTENTIONS = Registry('attention', 'moe.model.attention.Attention', Folder('moe.model.attention', 'ATTENTION'))
CACHED_ATTENTIONS = Registry(
  'attention in generation', 'moe.inference.attention.CachedAttention', Folder('moe.inference.attention', 'ATTENTION')
)
