"""The order of imports that ARCHITECTURE.md draws: from one folder of moe/ to those below it only, and in no circle."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest
from processes import environment

ROOT = pathlib.Path(__file__).resolve().parents[1]
# From the ground floor up. What stands on one line may not import each other, but for the files of one folder.
FLOORS = (
  ('errors',),
  ('files',),
  ('plugins',),
  ('registry',),
  ('validation',),
  ('config',),
  ('cli', 'data', 'ops'),
  ('parallel',),
  ('balance',),
  ('model',),
  ('train',),
  ('interop',),
  ('inference', 'sweep'),
  ('report',),
  ('bench', 'plan'),
  ('commands',),
  ('__main__',),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@functools.cache
def files() -> dict[str, pathlib.Path]:
  """Dotted name below moe -> file; a package has the name of its folder."""
  found = {}
  for path in sorted((ROOT / 'moe').rglob('*.py')):
    parts = path.relative_to(ROOT / 'moe').with_suffix('').parts
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  del found['']  # the legend and the library's front door
  return found


@functools.cache
def imports(name: str) -> frozenset[str]:
  """The files below moe that a file imports when it runs."""
  tree, found = ast.parse(files()[name].read_text()), set()
  typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING']
  skipped = {id(inner) for node in typed for inner in ast.walk(node)}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and id(node) not in skipped and f'{node.module}.'.startswith('moe.'):
      below = node.module.removeprefix('moe').removeprefix('.')
      for alias in node.names:
        inner = f'{below}.{alias.name}'.removeprefix('.')
        found.add(inner if inner in files() else below)
  return frozenset(found - {name, ''})


@pytest.mark.parametrize('folder', FLOOR_OF)
def test_arrows_point_down(folder):
  inside = [name for name in files() if name.split('.')[0] == folder]
  assert inside, f'there is no moe/{folder}'
  for name in inside:
    up = {
      one for one in imports(name) if one.split('.')[0] != folder and FLOOR_OF[one.split('.')[0]] >= FLOOR_OF[folder]
    }
    assert not up, f'moe.{name} imports {sorted(up)}, which stand above it or beside it'


def test_every_folder_has_a_floor():
  assert {name.split('.')[0] for name in files()} == set(FLOOR_OF)


def test_no_circles():
  done = set()

  def visit(name, path):
    assert name not in path, f'a circle: {" -> ".join([*path, name])}'
    if name not in done:
      for one in imports(name):
        visit(one, [*path, name])
      done.add(name)

  for name in files():
    visit(name, [])


def test_reports_need_no_model_code():
  """They are read on laptops, of runs of other versions: neither JAX nor Flax nor a checkpoint library is loaded."""
  code = 'import sys, moe.report.html, moe.report.sweep; print(*{"jax", "flax", "orbax", "grain"} & set(sys.modules))'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment(), capture_output=True, text=True)
  assert (done.returncode, done.stdout.strip()) == (0, ''), done.stderr
