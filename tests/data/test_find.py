"""Which files are text: each once, whatever leads to it, and no tool's copy and no run's own file among them."""

import json
import os
import pwd

import pytest

from moe.config import DataConfig
from moe.data.corpus import load_corpus
from moe.data.find import find
from moe.errors import UserError


def write(path, text='text'):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def found(root, paths, leave_out=()):
  """Names below `root` of the files that `paths` leads to."""
  return [os.path.relpath(path, root) for path, _ in find(str(paths), leave_out)]


@pytest.fixture
def text(tmp_path):
  for name in ('a/1.txt', 'a/2.txt', 'b/3.txt'):
    write(tmp_path / 'text' / name, name)
  return tmp_path / 'text'


ALL = ['a/1.txt', 'a/2.txt', 'b/3.txt']
PATTERNS = ('', '/**', '/**/*.txt', '/**/[0-9].txt')


def test_two_revisions_of_a_hub_cache_are_one_text(tmp_path):
  for n in range(20):
    write(tmp_path / f'hub/blobs/{n:02}', json.dumps({'text': f'document {n}'}))
    for revision in ('b', 'a'):
      (tmp_path / f'hub/snapshots/{revision}').mkdir(parents=True, exist_ok=True)
      (tmp_path / f'hub/snapshots/{revision}/{n:02}.jsonl').symlink_to(f'../../blobs/{n:02}')
  corpus = load_corpus(DataConfig(paths=str(tmp_path / 'hub'), val_fraction=0.2))
  assert (len(corpus.train), len(corpus.val)) == (16, 4)
  assert not {document.text for document in corpus.train} & {document.text for document in corpus.val}
  assert found(tmp_path / 'hub/snapshots', f'{tmp_path}/hub/*/*/*.jsonl') == [f'a/{n:02}.jsonl' for n in range(20)]


@pytest.mark.parametrize('pattern', PATTERNS)
def test_links_add_nothing_and_end(text, pattern):
  (text / 'a/again').symlink_to(text)  # in a circle
  (text / 'b/up').symlink_to('..')
  (text / '0').symlink_to(text / 'b')  # comes before what it leads to
  (text / '0.txt').symlink_to(text / 'b/3.txt')
  os.link(text / 'b/3.txt', text / 'c.txt')
  assert found(text, f'{text}{pattern}') == ALL


@pytest.mark.parametrize('pattern', PATTERNS)
def test_links_to_folders_elsewhere_are_followed(text, tmp_path, pattern):
  write(tmp_path / 'other/4.txt')
  (text / 'c').symlink_to(tmp_path / 'other')
  assert found(text, f'{text}{pattern}') == [*ALL, 'c/4.txt']


def test_a_file_that_is_named_as_well_keeps_its_place(text):
  (text / 'link.txt').symlink_to(text / 'a/1.txt')
  files = find(f'{text},{text}/link.txt')
  assert [path for path, _ in files] == [str(text / name) for name in ALL]
  assert [explicit for _, explicit in files] == [True, False, False]


@pytest.mark.parametrize('pattern', PATTERNS)
def test_what_tools_leave_behind_is_no_text(text, pattern):
  for name in ('.ipynb_checkpoints/1-checkpoint.txt', 'a/.git/x.txt', '.history/a/1_2024.txt', 'a/._1.txt', '.2.txt'):
    write(text / name)
  (text / 'a/.#1.txt').symlink_to('user@host.1234')
  assert found(text, f'{text}{pattern}') == ALL


def test_hidden_names_may_be_named(tmp_path):
  write(tmp_path / '.hidden/x.txt')
  write(tmp_path / '.hidden/.y.txt')
  assert found(tmp_path, tmp_path / '.hidden') == ['.hidden/x.txt']
  assert found(tmp_path, f'{tmp_path}/.hidden/.y.txt') == ['.hidden/.y.txt']
  assert found(tmp_path, f'{tmp_path}/.hidden/.*.txt') == ['.hidden/.y.txt']


def make_run(folder):
  for name in ('config.json', 'metrics.jsonl', 'sample.txt', 'tensorboard/notes.txt', 'checkpoints/1/x.txt'):
    write(folder / name)
  return folder


@pytest.mark.parametrize('pattern', [*PATTERNS, '/*/*.txt'])
def test_runs_are_no_text(text, pattern):
  make_run(text / 'runs/one')
  write(text / 'sweep/sweep.json')
  write(text / 'sweep/sign,seed=0/log.txt')  # of a run that has only just been started
  write(text / 'own/sample.txt')
  assert found(text, f'{text}{pattern}', [text / 'own']) == ALL


def test_a_run_has_the_same_text_at_every_start(text):
  data = DataConfig(paths=str(text), val_fraction=0.4)
  first = load_corpus(data, [text / 'run']).digest
  assert load_corpus(data, [make_run(text / 'run')]).digest == first == load_corpus(data).digest


def test_text_inside_the_workdir_is_text(tmp_path):
  run = make_run(tmp_path / 'run')
  write(run / 'text/a.txt')
  assert found(run, run / 'text', [run]) == ['text/a.txt']
  assert found(run, f'{run}/text/*', [run]) == ['text/a.txt']


@pytest.mark.parametrize('pattern', ['', '/', '/*.txt', '/**'])
def test_the_workdir_itself_is_refused(text, pattern):
  with pytest.raises(UserError, match='is the workdir, where the run writes'):
    find(f'{text}{pattern}', [text])


def test_only_files_are_read(text):
  os.mkfifo(text / 'pipe.txt')
  (text / 'zero.txt').symlink_to('/dev/zero')
  for name in ('pipe.txt', 'zero.txt'):
    for paths in (text / name, text):
      with pytest.raises(UserError, match=r'cannot read .*: it is a pipe or device'):
        find(str(paths))
    (text / name).unlink()


@pytest.mark.parametrize('home', [True, False])
def test_a_home_that_does_not_exist(monkeypatch, home):
  def getpwuid(uid):
    raise KeyError(uid)

  if not home:
    monkeypatch.delenv('HOME', raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', getpwuid)
  with pytest.raises(UserError, match=r"path '~.*/x' of data\.paths does not exist"):
    find('~nosuchuser/x' if home else '~/x')


def test_globs_are_those_of_the_library(text, monkeypatch):
  import glob

  write(text / 'a/deep/er/4.txt')
  write(text / '0.txt')  # which '*/**' matches as well, and is no folder
  monkeypatch.chdir(text)
  for pattern in (
    '**/*.txt',
    'a/**/*.txt',
    '*/**/[34].txt',
    '**/deep/**',
    'a/**',
    '**/a/*',
    './**/er/*.txt',
    '?/*.txt',
    '*/**/*.txt',
    '[ab0]*/**/*.txt',
  ):
    expected = {os.path.realpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    assert {path for path, _ in find(pattern)} == expected
