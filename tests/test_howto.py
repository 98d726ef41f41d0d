"""docs/howto, to the letter: the files of each page are written, its rows added, its commands run.

A file stands under "New file `NAME`", rows of tests in `diff` blocks, commands behind `$` in `console` blocks. Pages
with a file of moe/ are followed in a copy of the code; the others, of plugins and callbacks, in an empty folder.
"""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from processes import environment
from train.small_runs import SMALL, flags, write_corpus

from moe.files import read_json

ROOT = pathlib.Path(__file__).resolve().parents[1]
OF_THE_CODE = [page for page in sorted((ROOT / 'docs/howto').glob('*.md')) if 'New file `moe/' in page.read_text()]
NEW_FILE = re.compile(r'New file `([^`]+)`[^\n]*(?:\n[^`\n]+)*\n\n```python\n(.*?)```', re.DOTALL)
BLOCK = re.compile(r'```(\w+)\n(.*?)```', re.DOTALL)


def followed(page: str, folder: pathlib.Path) -> list[str]:
  """Writes the files of a page into a folder and adds its rows to the tests there; returns its commands."""
  text = (ROOT / 'docs/howto' / page).read_text()
  blocks = lambda kind: [body for found, body in BLOCK.findall(text) if found == kind]
  files = NEW_FILE.findall(text)
  assert len(files) == len(blocks('python')), 'a block without the name of its file'
  for file, body in files:
    assert not (folder / file).exists()
    (folder / file).write_text(body)
  for diff in blocks('diff'):
    apply_diff(folder, diff)
  return [line.removeprefix('$ ') for block in blocks('console') for line in block.splitlines()]


def apply_diff(folder: pathlib.Path, diff: str) -> None:
  """Lines with - and + after lines that stay; what stays and goes must stand in the file, and once only."""
  for file, changes in re.findall(r'^--- (\S+)\n(.*?)(?=^--- |\Z)', diff, re.MULTILINE | re.DOTALL):
    for change in re.findall(r'(?:^[ -].*\n)+(?:^\+.*\n)+', changes, re.MULTILINE):
      before = ''.join(line[1:] for line in change.splitlines(keepends=True) if line[0] != '+')
      after = ''.join(line[1:] for line in change.splitlines(keepends=True) if line[0] != '-')
      text = (folder / file).read_text()
      assert text.count(before) == 1, f'{file} has these lines {text.count(before)} times:\n{before}'
      (folder / file).write_text(text.replace(before, after))


def run(command: str, folder: pathlib.Path, *more: str) -> subprocess.CompletedProcess:
  """A command of a page, in a folder, with the code that is there or else this one, and with more arguments."""
  program, *arguments = shlex.split(command)
  whole = [sys.executable, *{'python': [], 'moe': ['-m', 'moe']}[program], *arguments, *more]
  env = environment() | {'PYTHONPATH': str(folder if (folder / 'moe').exists() else ROOT)}
  return subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture
def copy(tmp_path):
  for name in ('moe', 'configs', 'experiments', 'tests'):
    ignored = shutil.ignore_patterns('__pycache__', 'results', 'configs')
    shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored if name != 'configs' else None)
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  return tmp_path


@pytest.mark.parametrize('page', OF_THE_CODE, ids=lambda page: page.stem)
def test_page(page, copy):
  commands = followed(page.name, copy)
  assert commands
  for command in commands:
    done = run(command, copy)
    assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  corpus = write_corpus(tmp_path_factory.mktemp('corpus'))
  return flags(corpus, **{'train.steps': 4, 'train.eval_every': 2, 'checkpoint.every_steps': 2})


def test_a_metric(small, tmp_path):
  train, report = followed('metric.md', tmp_path)
  done = run(train, tmp_path, *small)
  assert done.returncode == 0, done.stderr
  assert len(re.findall(r'busiest_tenth_global 0\.\d+', done.stderr)) == 2
  folder = tmp_path / 'runs/mine'
  rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert len(rows) == 4
  assert all(1 / 8 <= row['busiest_tenth_batch'] <= 1 for row in rows)
  evals = [json.loads(line) for line in (folder / 'evals.jsonl').read_text().splitlines()]
  load_E = evals[-1]['load_LE'][0]
  assert evals[-1]['busiest_tenth_global'] == max(load_E) / sum(load_E)
  title = 'share of the busiest tenth'
  assert f'<figcaption>{title}</figcaption>' in (folder / 'report.html').read_text()
  done = run(report, tmp_path)
  assert done.returncode == 0, done.stderr
  assert f'<figcaption>{title}</figcaption>' in (folder / 'report.html').read_text()
  without = report.split(' --plugins')[0]
  summary = json.loads(run(without, tmp_path).stdout)
  assert summary['busiest_tenth_global'] == evals[-1]['busiest_tenth_global']
  (line,) = summary['missing_plugins']
  assert line == f"the metric 'busiest_tenth' of a plugin; give --plugins={tmp_path / 'busiest_tenth.py'} again"
  assert '<figcaption>busiest_tenth</figcaption>' in (folder / 'report.html').read_text()


def test_a_rule_and_a_dispatcher(small, tmp_path):
  train, ablate = followed('plugins.md', tmp_path)
  done = run(train, tmp_path, *small)
  assert done.returncode == 0, done.stderr
  assert 'tokens stay where they are' in done.stdout
  info, file = read_json(tmp_path / 'runs/root/config.json'), str(tmp_path / 'mine.py')
  kinds = [('bias rule', 'root'), ('dispatcher', 'chatty')]
  assert info['plugins'] == [{'kind': kind, 'name': name, 'file': file} for kind, name in kinds]
  assert '--plugins=mine.py' in ablate
  for other in ('moe evaluate --checkpoint=runs/root', 'moe generate --checkpoint=runs/root --prompt=x'):
    done = run(other, tmp_path)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
    message = f"was trained with the bias rule 'root' of a plugin; give --plugins={file} again\n"
    assert done.stderr.endswith(message)
  done = run(f'moe evaluate --checkpoint=runs/root --plugins={file}', tmp_path)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['step'] == 4


def test_a_callback(small, tmp_path, monkeypatch, capsys):
  followed('callbacks.md', tmp_path)
  code = (tmp_path / 'best.py').read_text()
  settings = "{'train.steps': 200, 'train.eval_every': 50}"
  assert settings in code
  corpus = next(flag for flag in small if 'data.paths' in flag).split('=')[1]
  smaller = SMALL | {'data.paths': corpus, 'train.steps': 4, 'train.eval_every': 2}
  monkeypatch.chdir(tmp_path)
  defined = {}
  exec(compile(code.replace(settings, repr(smaller)), 'best.py', 'exec'), defined)
  evals = [json.loads(line) for line in (tmp_path / 'runs/best/evals.jsonl').read_text().splitlines()]
  assert defined['best'].best['val_loss'] == min(row['val_loss'] for row in evals)
  assert defined['summary']['finished']
  assert re.search(r'runs/best: best at step [24], slowest step \d+\.\d\d s', capsys.readouterr().out)
