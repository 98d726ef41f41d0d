"""What may be added to without a fork: registries, and a user's Python files that add to them (--plugins=FILE).

A registry is a mapping, name -> what does it, such as `moe.balance.metrics.METRICS` and those of `moe.registry`. A
plugin is run before anything is checked or compiled; what it adds is as good as what was there, and a run writes down
what it was trained with. How to write one: docs/howto/plugins.md.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.errors import UserError
from moe.files.paths import local_path, run_python

FLAG = '--plugins'
REGISTRIES: dict[str, 'Registry'] = {}  # by kind, as far as they have been imported
_loaded: dict[Path, None] = {}
_running: list[Path] = []  # the plugin that is being run, if one is


class Registry(Mapping[str, Any]):
  """Name -> what does it, of one kind.

  Args:
    kind: what an entry is, for messages.
    known: entries besides those that are added.
  """

  def __init__(self, kind: str, known: Mapping[str, Any] | None = None):
    self.kind, self._known = kind, known or {}
    self._entries: dict[str, Any] = {}
    self.added: dict[str, str] = {}  # file of what a plugin added
    REGISTRIES[kind] = self

  def __iter__(self) -> Iterator[str]:
    return itertools.chain(self._known, self._entries)

  def __len__(self) -> int:
    return len(self._known) + len(self._entries)

  def __contains__(self, name) -> bool:
    return name in self._known or name in self._entries

  def __getitem__(self, name: str):
    return self._entries[name] if name in self._entries else self._known[name]

  def add(self, name: str, value: Any) -> None:
    """Adds an entry. Raises ValueError, which `load` makes a line of: a bad name, or one that is taken."""
    if not re.fullmatch('[a-z][a-z0-9_]{0,63}', name):
      raise ValueError(f'{self.kind} {name!r} must be called by small letters, digits and _')
    if name in self:
      raise ValueError(f'there is a {self.kind} {name!r} already; choose another name')
    self._entries[name] = value
    if _running:
      self.added[name] = str(_running[-1])


def load(files: Iterable[str]) -> None:
  """Runs plugins, each once. Raises UserError, with file and line: unreadable, or it raises."""
  for text in files:
    path = local_path(text, FLAG).absolute()
    if path in _loaded:
      continue
    _running.append(path)
    try:
      run_python(path, FLAG)
    finally:
      _running.pop()
    _loaded[path] = None


def arguments() -> list[str]:
  """The flags with which another process loads the same plugins."""
  return [f'{FLAG}={path}' for path in _loaded]


def description() -> list[dict[str, str]]:
  """What plugins added, as a run writes it down: {'kind', 'name', 'file'} each."""
  return [
    {'kind': registry.kind, 'name': name, 'file': file}
    for registry in REGISTRIES.values()
    for name, file in registry.added.items()
  ]


def missing(described: Any) -> list[dict[str, str]]:
  """What a run was trained with, by its `description` from a file, and is not here."""
  found = described if isinstance(described, list) else []
  found = [one for one in found if isinstance(one, dict) and all(isinstance(value, str) for value in one.values())]
  found = [one for one in found if {'kind', 'name', 'file'} <= one.keys()]
  return [one for one in found if one['name'] not in REGISTRIES.get(one['kind'], {})]


def check(described: Any, where: str, but: str = '') -> None:
  """Raises UserError, which begins with `where`, if something of a `description` is not here.

  Args:
    but: a kind that may be missing.
  """
  for one in missing(described):
    if one['kind'] != but:
      raise UserError(f'{where} was trained with {line(one)}')


def line(one: dict[str, str]) -> str:
  """What is missing and how to give it, in a few words."""
  return f'the {one["kind"]} {one["name"]!r} of a plugin; give {FLAG}={one["file"] or "FILE"} again'
