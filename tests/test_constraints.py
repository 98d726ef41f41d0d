"""The versions that `make` installs: whole, of what setup.py asks for, and none of one machine's own."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

FILES = sorted((Path(__file__).parents[1] / 'constraints').glob('*.txt'))


def canonical(name):
  return re.sub('[-_.]+', '-', name).lower()


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_holds_a_version_of_everything_that_is_needed(path):
  lines = [line for line in path.read_text().splitlines() if not line.startswith('#')]
  assert [line for line in lines if not re.fullmatch(r'[\w.-]+==[\w.+!]+', line)] == []  # no paths, no addresses
  versions = {canonical(name): version for name, version in (line.split('==') for line in lines)}
  there = {'extra': 'test', 'python_version': path.stem.removeprefix('python')}
  needs = map(Requirement, importlib.metadata.requires('moe-lossfree'))
  needs = [need for need in needs if not need.marker or need.marker.evaluate(there)]
  assert len(needs) > 15
  right = lambda need: (version := versions.get(canonical(need.name))) and version in need.specifier
  assert [str(need) for need in needs if not right(need)] == []


def test_the_oldest_is_the_oldest_python_that_is_allowed():
  oldest = min(FILES, key=lambda path: [int(part) for part in re.findall(r'\d+', path.stem)])
  assert importlib.metadata.metadata('moe-lossfree')['Requires-Python'] == '>=' + oldest.stem.removeprefix('python')
