"""What stands around the code says the same as the code: versions, and the Pythons that CI runs."""

import datetime
import pathlib
import re

import yaml

import moe

ROOT = pathlib.Path(__file__).resolve().parents[1]


def releases():
  """(version, date) by the headings of the changelog, the newest first."""
  return re.findall(r'^## \[(\d+\.\d+\.\d+)\] - (\S+)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)


def test_versions_agree():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == moe.__version__
  assert releases()[0] == (moe.__version__, citation['date-released'].isoformat())


def test_the_changelog_is_in_order():
  headings = re.findall(r'^## (.*)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
  assert headings[0] == '[Unreleased]', 'what comes next has a place to go'
  assert len(headings) == 1 + len(releases())
  keys = [(datetime.date.fromisoformat(date), *map(int, version.split('.'))) for version, date in releases()]
  assert keys == sorted(keys, reverse=True)


def test_the_citation_names_who_and_what():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['cff-version'] == '1.2.0'
  assert {'message', 'title', 'authors'} <= citation.keys()
  assert citation['license'] == 'Apache-2.0'
  readme = (ROOT / 'README.md').read_text()
  assert all(reference['url'].rpartition('/')[2] in readme for reference in citation['references'])


def test_ci_runs_on_every_python_of_constraints():
  workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
  assert workflow[True] == ['push', 'pull_request']  # YAML 1.1 reads `on` as a truth
  job = workflow['jobs']['ci']
  known = {path.stem.removeprefix('python') for path in (ROOT / 'constraints').glob('python*.txt')}
  assert set(job['strategy']['matrix']['python']) == known
  assert job['steps'][-1]['run'] == 'bash .ci/run ${{ matrix.python }}'
