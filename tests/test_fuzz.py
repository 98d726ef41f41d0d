"""A seeded sample of `tests/fuzz.py`, which runs many more."""

import time

import numpy as np
import pytest
from fuzz import KINDS, Subjects, damage

from moe.files import replacing

COUNTS = {'report': 40, 'load': 12, 'train': 5, 'sweep': 20, 'import': 12}


@pytest.fixture(scope='module')
def subjects(tmp_path_factory, unrendered):
  return Subjects(tmp_path_factory.mktemp('fuzz') / 'subjects')


@pytest.mark.parametrize('name', COUNTS)
def test_damage_gives_the_same_numbers_or_one_line(subjects, name):
  found = [subjects.outcome(name, np.random.default_rng((7, number))) for number in range(COUNTS[name])]
  assert [what for kind, what in found if kind == 'FAULT'] == []
  # Orbax gives its files random names, so which five files are damaged before 'train' is another matter each time.
  assert name == 'train' or any(kind == 'refused' for kind, _ in found), 'or nothing is noticed'


def test_training_notices_damage(subjects, monkeypatch):
  """With the one file that says which data the run read, whatever the names that Orbax draws."""
  monkeypatch.setattr('fuzz.KINDS', {'cut': lambda file, text, rng: file.write_bytes(text[: len(text) // 2])})
  run = subjects.folder / 'run'
  monkeypatch.setattr('fuzz.UNREAD', tuple(path.name for path in run.iterdir() if path.name != 'data.json'))
  kind, what = subjects.outcome('train', np.random.default_rng(0))
  assert (kind, 'data.json is no valid JSON' in what) == ('refused', True)


def test_a_fault_would_be_found(subjects, monkeypatch):
  """The same with what makes other numbers, a traceback or a long line."""
  for fault in (lambda _: 'other', lambda _: 1 / 0):
    monkeypatch.setitem(subjects.actions, 'report', ('run', fault))
    assert subjects.outcome('report', np.random.default_rng(0))[0] == 'FAULT'


def test_a_hang_would_be_found(subjects, monkeypatch):
  """In a block that makes one line of every OSError, as a pipe that is read without a look."""

  def hangs(run):
    with replacing(run / 'a'):
      time.sleep(10)

  monkeypatch.setattr('fuzz.LIMIT_S', 1)
  monkeypatch.setitem(subjects.actions, 'report', ('run', hangs))
  kind, what = subjects.outcome('report', np.random.default_rng(0))
  assert (kind, 'Hangs still at it' in what) == ('FAULT', True)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_changes_a_file(kind, tmp_path, monkeypatch):
  (tmp_path / 'a.json').write_text('{"a": [1, 2], "b": {"c": "text"}}\n')
  (tmp_path / 'b').write_bytes(b'\3\4')
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  monkeypatch.setattr('fuzz.KINDS', {kind: KINDS[kind]})
  assert damage(tmp_path, np.random.default_rng(1)).startswith(kind)
  after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and not path.is_symlink()}
  assert after != before
