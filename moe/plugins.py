"""What may be added to without a fork: registries, and a user's Python files that add to them (--plugins=FILE).

A registry is a mapping, name -> what does it, such as `moe.balance.metrics.METRICS` and those of `moe.registry`. A
plugin is run before anything is checked or compiled; what it adds is as good as what was there, and a run writes down
what it was trained with. How to write one: docs/howto/plugins.md.
"""

import contextlib
import itertools
import pkgutil
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.errors import UserError, short
from moe.files.paths import line_of, local_path, mistake, run_python

FLAG = '--plugins'
REGISTRIES: dict[str, 'Registry'] = {}  # by kind, as far as they have been imported
_loaded: dict[Path, None] = {}
_running: list[Path] = []  # the plugin that is being run, if one is


class Registry(Mapping[str, Any]):
  """Name -> what does it, of one kind.

  Args:
    kind: what an entry is, for messages.
    of: dotted name of the class that entries are objects of; imported when one is added.
    known: entries besides those that are added.
    taken: names that mean something else where an entry's name stands.
  """

  def __init__(self, kind: str, of: str, known: Mapping[str, Any] | None = None, taken: Collection[str] = ()):
    self.kind, self._of, self._known, self._taken = kind, of, known or {}, taken
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
    """Adds an entry. Raises ValueError, which `load` makes a line of: a bad name, one that is taken, a wrong kind."""
    if not (isinstance(name, str) and re.fullmatch('[a-z][a-z0-9_]{0,63}', name)):
      raise ValueError(f'{self.kind} {short(name)} must be called by small letters, digits and _')
    if name in self:
      raise ValueError(f'there is a {self.kind} {name!r} already; choose another name')
    if name in self._taken:
      raise ValueError(f'{name!r} means something else where a {self.kind} is named; choose another name')
    if isinstance(value, type) or not isinstance(value, pkgutil.resolve_name(self._of)):
      found = f'the class {value.__name__}' if isinstance(value, type) else short(value)
      raise ValueError(f'{self.kind} {name!r} must be an object of {self._of}, not {found}')
    self._entries[name] = value
    if _running:
      self.added[name] = str(_running[-1])

  def title(self, name: str) -> str:
    """What a message calls an entry: by the file, too, if a plugin has added it."""
    file = self.added.get(name)
    return f'{self.kind} {name!r}' + (f' of {FLAG}={file}' if file else '')

  def expect(self, name: str, what: str, found: Any, shape: tuple[int | str, ...], dtype: Any = '') -> None:
    """Raises UserError unless what an entry gave is an array of this shape: a smaller one would be broadcast, silently.

    Args:
      name: of the entry.
      what: it should be, for the message.
      found: it is.
      shape: sizes; a letter for any size, and '...' at the end for any further axes.
      dtype: '' for any.
    """
    is_array = hasattr(found, 'shape') and hasattr(found, 'dtype')
    if not (is_array and _fits(tuple(found.shape), shape) and str(dtype) in ('', str(found.dtype))):
      due = _described(dtype or 'an array', shape)
      there = _described(found.dtype, found.shape) if is_array else short(found)
      raise UserError(f'{self.title(name)} must give {what} as {due}, not {there}')

  def expect_all(self, name: str, what: str, found: Any, like: Mapping[str, Any]) -> None:
    """Raises UserError unless what an entry gave has all arrays of a dict, by name, and each of its shape and dtype.

    Args:
      name: of the entry.
      what: it should be, for the message.
      found: it is.
      like: the dict.
    """
    if not isinstance(found, dict) or found.keys() != like.keys():
      there = f'one of {", ".join(map(str, found))}' if isinstance(found, dict) else short(found)
      raise UserError(f'{self.title(name)} must give {what} as a dict of {", ".join(like)}, not {there}')
    for key, array in like.items():
      self.expect(name, f'{what}[{key!r}]', found[key], array.shape, array.dtype)


def _fits(shape: tuple[int, ...], due: tuple[int | str, ...]) -> bool:
  if due[-1:] == ('...',):
    due, shape = due[:-1], shape[: len(due) - 1]
  return len(shape) == len(due) and all(
    isinstance(size, str) or size == there for size, there in zip(due, shape, strict=True)
  )


def _described(dtype: Any, shape: tuple[int | str, ...]) -> str:
  return f'{dtype} [{", ".join(map(str, shape))}]'


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


@contextlib.contextmanager
def blamed() -> Iterator[None]:
  """Around what runs once plugins are loaded: what is raised in the code of one is a UserError with its line."""
  try:
    yield
  except (UserError, BrokenPipeError):  # the latter: nobody reads what a plugin prints, which is no mistake in it
    raise
  except Exception as error:
    for path in _loaded:
      if line_of(path, error):
        raise mistake(path, FLAG, error) from error
    raise


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
