"""docs/howto, to the letter: each page in a copy of the code, its files written, its rows added, its commands run."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from processes import environment

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [page for page in sorted((ROOT / 'docs/howto').glob('*.md')) if 'New file `' in page.read_text()]
NEW_FILE = re.compile(r'New file `([^`]+)`[^\n]*(?:\n[^`\n]+)*\n\n```python\n(.*?)```', re.DOTALL)
BLOCK = re.compile(r'```(\w+)\n(.*?)```', re.DOTALL)


def blocks(text: str, kind: str) -> list[str]:
  return [body for found, body in BLOCK.findall(text) if found == kind]


def apply_diff(folder: pathlib.Path, diff: str) -> None:
  """Lines with - and + after lines that stay; what stays and goes must stand in the file, and once only."""
  for file, changes in re.findall(r'^--- (\S+)\n(.*?)(?=^--- |\Z)', diff, re.MULTILINE | re.DOTALL):
    for change in re.findall(r'(?:^[ -].*\n)+(?:^\+.*\n)+', changes, re.MULTILINE):
      before = ''.join(line[1:] for line in change.splitlines(keepends=True) if line[0] != '+')
      after = ''.join(line[1:] for line in change.splitlines(keepends=True) if line[0] != '-')
      text = (folder / file).read_text()
      assert text.count(before) == 1, f'{file} has these lines {text.count(before)} times:\n{before}'
      (folder / file).write_text(text.replace(before, after))


@pytest.fixture
def copy(tmp_path):
  for name in ('moe', 'configs', 'experiments', 'tests'):
    ignored = shutil.ignore_patterns('__pycache__', 'results', 'configs')
    shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored if name != 'configs' else None)
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  return tmp_path


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_page(page, copy):
  text = page.read_text()
  files = NEW_FILE.findall(text)
  assert len(files) == len(blocks(text, 'python')), 'a block without the name of its file'
  for file, body in files:
    assert not (copy / file).exists()
    (copy / file).write_text(body)
  for diff in blocks(text, 'diff'):
    apply_diff(copy, diff)
  commands = [line[2:] for block in blocks(text, 'console') for line in block.splitlines()]
  assert commands
  for command in commands:
    program, *arguments = shlex.split(command)
    assert program == 'python'
    env = environment() | {'PYTHONPATH': str(copy)}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
