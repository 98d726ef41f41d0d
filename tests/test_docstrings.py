"""Functions of many parameters explain them, in a section Args of their docstring."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'moe'
MANY = 4  # parameters, from which on a signature does not explain itself


def is_public(path: Path) -> bool:
  return not any(part.startswith('_') and part != '__init__.py' for part in path.relative_to(PACKAGE).parts)


def functions_of(tree: ast.Module):
  """(name, function, docstrings that may explain its parameters) of what a module offers: functions and methods."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
      yield node.name, node, [ast.get_docstring(node)]
    elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
      for method in node.body:
        if isinstance(method, ast.FunctionDef) and (method.name == '__init__' or not method.name.startswith('_')):
          own = [ast.get_docstring(method)]
          yield f'{node.name}.{method.name}', method, [*own, ast.get_docstring(node)] if own == [None] else own


def parameters_of(function: ast.FunctionDef) -> list[str]:
  args = function.args
  names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg]
  return [name for name in names if name not in ('self', 'cls')]


def explained_in(docstring: str | None) -> set[str]:
  """Names that begin an entry of the section Args: 'x_TD, y_TD: ...'."""
  section = re.search(r'^Args:\n((?:  .*\n|\n)+)', f'{docstring or ""}\n', re.MULTILINE)
  entries = re.findall(r'^  ([*\w, ]+):', section[1], re.MULTILINE) if section else []
  return {name.strip().lstrip('*') for entry in entries for name in entry.split(',')}


def documented_bases() -> set[str]:
  """Methods of classes whose subclasses are other files': their contract stands once, with the base."""
  found = set()
  for path in PACKAGE.rglob('*.py'):
    for name, function, docstrings in functions_of(ast.parse(path.read_text('utf-8'))):
      if '.' in name and any(set(parameters_of(function)) <= explained_in(docstring) for docstring in docstrings):
        found.add(name)
  return found


def missing() -> list[str]:
  found, bases = [], documented_bases()
  for path in sorted(filter(is_public, PACKAGE.rglob('*.py'))):
    tree = ast.parse(path.read_text('utf-8'))
    parents = {
      node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
      for node in tree.body
      if isinstance(node, ast.ClassDef)
    }
    for name, function, docstrings in functions_of(tree):
      owner, _, method = name.rpartition('.')
      inherited = {f'{base}.{method}' for base in parents.get(owner, ())}
      names = parameters_of(function)
      explained = set().union(*map(explained_in, docstrings))
      if len(names) >= MANY and not set(names) <= explained and not inherited & bases:
        lacks = ', '.join(name for name in names if name not in explained)
        found.append(f'{path.relative_to(PACKAGE)}: {name} does not say of {lacks}')
  return found


def test_what_is_passed_is_explained():
  assert missing() == []


def test_finds_what_is_not_explained():
  tree = ast.parse(
    'class A:\n  def f(self, a, b, *c, d=1, **e):\n    """F.\n\n    Args:\n      a, b: two.\n      c: c.\n    """\n'
  )
  ((name, function, (docstring,)),) = functions_of(tree)
  assert (name, parameters_of(function)) == ('A.f', ['a', 'b', 'd', 'c', 'e'])
  assert explained_in(docstring) == {'a', 'b', 'c'}
