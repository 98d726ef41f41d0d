"""experiments/python_corpus.py: which files it takes from wheels, and what it refuses."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

from moe.config import DataConfig
from moe.data.corpus import load_corpus

ROOT = pathlib.Path(__file__).parents[2]


def wheel(folder, package, files):
  folder.mkdir(exist_ok=True)
  with zipfile.ZipFile(folder / f'{package}-1.0-py3-none-any.whl', 'w') as file:
    for name, text in files.items():
      file.writestr(name, text)


def make(wheels, out, *flags):
  script = [sys.executable, str(ROOT / 'experiments/python_corpus.py')]
  return subprocess.run([*script, f'--wheels={wheels}', f'--out={out}', *flags], capture_output=True, text=True)


def text(i, size=100):
  return f'{i:03} = 0\n'.encode() * (size // 8)


def test_each_text_once_and_no_large_small_or_binary_file(tmp_path):
  first = {'a/x.py': text(1), 'a/same.py': text(1), 'a/large.py': text(2, 1200), 'a/small.py': b'x = 1\n'}
  wheel(
    tmp_path / 'wheels',
    'a',
    first | {'a/nul.py': text(3) + b'\0', 'a/latin.py': text(4) + b'\xe9', 'a/data.txt': text(5)},
  )
  wheel(tmp_path / 'wheels', 'b', {'b/x.py': text(1), 'b/y.py': text(6), '../up.py': text(7), '/abs.py': text(8)})
  (tmp_path / '.out.partial').mkdir()
  (tmp_path / '.out.partial' / 'left.py').write_bytes(text(9))  # by a call for other wheels that was killed
  done = make(tmp_path / 'wheels', tmp_path / 'out', '--max_kb=1')
  assert done.returncode == 0, done.stderr
  found = {
    path.relative_to(tmp_path / 'out').as_posix(): path.read_bytes() for path in (tmp_path / 'out').rglob('*.py')
  }
  assert found == {'a/a/x.py': text(1), 'b/b/y.py': text(6)}
  assert '2 files of 2 packages' in done.stdout
  corpus = load_corpus(DataConfig(paths=str(tmp_path / 'out'), val_fraction=0.5))
  assert [len(corpus.train), len(corpus.val)] == [1, 1]


def test_a_package_has_its_share_the_same_at_every_call(tmp_path):
  wheel(tmp_path / 'wheels', 'a', {f'a/{i}.py': text(i, 400_000) for i in range(5)})
  wheel(tmp_path / 'wheels', 'b', {'b/x.py': text(9)})
  for out in ('first', 'second'):
    assert make(tmp_path / 'wheels', tmp_path / out, '--max_kb=500', '--max_package_mb=1').returncode == 0
  first, second = (
    sorted(path.relative_to(tmp_path / out) for path in (tmp_path / out).rglob('*.py')) for out in ('first', 'second')
  )
  assert first == second
  assert len(first) == 3  # two of a's, as the third would be past 10^6 bytes


@pytest.mark.parametrize(
  ('files', 'out', 'said'),
  [
    ({}, 'out', 'is no folder with wheels'),
    ({'a-1.0-py3-none-any.whl': b'no zip'}, 'out', 'cannot read wheel'),
    ({'a-1.0-py3-none-any.whl': b'no zip'}, '.', 'exists; choose another folder'),
  ],
)
def test_bad_input_is_one_line(tmp_path, files, out, said):
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  done = make(tmp_path, tmp_path / out)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith('error: ')
  assert said in done.stderr
  assert not (tmp_path / 'out').exists()


def test_wheels_without_source_are_an_error(tmp_path):
  wheel(tmp_path / 'wheels', 'a', {'a/data.txt': text(1)})
  done = make(tmp_path / 'wheels', tmp_path / 'out')
  assert done.returncode == 2
  assert 'hold no *.py file' in done.stderr


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
  wheel(tmp_path / 'wheels', 'a', {'a/x.py': text(1)})
  (tmp_path / 'file').touch()
  done = make(tmp_path / 'wheels', tmp_path / 'file' / 'out')
  assert done.returncode == 2
  assert 'Not a directory' in done.stderr.splitlines()[-1]
