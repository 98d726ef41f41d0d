"""Two runs, compared."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from fake_run import write_json, write_jsonl, write_run
from processes import script

from moe.errors import UserError
from moe.report import compare
from moe.report.run import load_run

ROOT = pathlib.Path(__file__).parents[2]


def shifted(path, tmp_path, name, factor, **data):
  """The run of `path` again, with every loss times `factor`."""
  other = write_run(tmp_path / name)
  rows = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  write_jsonl(other / 'metrics.jsonl', [row | {'loss': factor * row['loss']} for row in rows[:-20]])
  write_json(other / 'data.json', json.loads((path / 'data.json').read_text()) | data)
  return other


def test_compare_reports_the_relative_difference_of_common_steps(tmp_path):
  path = write_run(tmp_path / 'one')
  found = compare.compare(load_run(path), load_run(shifted(path, tmp_path, 'two', 1.002)), last=100)
  losses = [json.loads(line)['loss'] for line in (path / 'metrics.jsonl').read_text().splitlines()][180:280]
  assert (found['steps'], found['last']) == (280, 100)
  assert found['mean_difference'] == pytest.approx(0.002) == found['mean_absolute_difference']
  assert found['loss'] == pytest.approx(np.mean(losses))
  assert found['other_loss'] == pytest.approx(1.002 * np.mean(losses))


def test_compare_draws_both_and_is_a_script(tmp_path):
  path = write_run(tmp_path / 'one')
  other = shifted(path, tmp_path, 'two', 0.99)
  command = [sys.executable, ROOT / 'experiments/compare.py', path, other, f'--plot={tmp_path}/two.png']
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(done.stdout)['mean_difference'] == pytest.approx(-0.01)
  assert done.stderr == f'picture: {tmp_path}/two.png\n'
  assert (tmp_path / 'two.png').read_bytes().startswith(b'\x89PNG')


def test_a_picture_that_cannot_be_drawn_is_refused_first():
  for name, message in (('two.txt', 'must end in .png or .pdf or .svg'), ('nowhere/two.png', "no folder 'nowhere'")):
    with pytest.raises(UserError, match=message):
      script('compare', 'no_run', 'none_either', f'--plot={name}')


def test_compare_refuses_what_does_not_compare(tmp_path):
  path = write_run(tmp_path / 'one')
  base = load_run(path)
  with pytest.raises(UserError, match='differ in text'):
    compare.compare(base, load_run(shifted(path, tmp_path, 'two', 1, digest='another')), 10)
  for last in (0, 301):
    with pytest.raises(UserError, match='300 steps in common'):
      compare.compare(base, base, last)
