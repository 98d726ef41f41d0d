"""The pages of docs/howto, followed to the letter: their code in files of that name, their commands in a folder."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from processes import environment
from train.small_runs import SMALL, flags, write_corpus

from moe.files import read_json

ROOT = pathlib.Path(__file__).resolve().parents[1]


def followed(page: str, folder: pathlib.Path) -> list[str]:
  """Writes the Python blocks of a page, each under the name in its first line; the commands of its bash blocks."""
  text = (ROOT / 'docs/howto' / page).read_text()
  for name, code in re.findall(r'```python\n# (\w+\.py)\n(.*?)```', text, re.DOTALL):
    (folder / name).write_text(code)
  return [line for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL) for line in block.splitlines()]


def run(command: str, folder: pathlib.Path, *more: str) -> subprocess.CompletedProcess:
  """A command of a page, in a folder, with settings behind its own that make it small."""
  program, *arguments = shlex.split(command, comments=True)
  assert program == 'moe'
  environ = environment() | {'PYTHONPATH': str(ROOT)}
  whole = [sys.executable, '-m', 'moe', *arguments, *more]
  return subprocess.run(whole, cwd=folder, env=environ, capture_output=True, text=True, timeout=300)


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
