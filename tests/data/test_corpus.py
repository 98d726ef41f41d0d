"""Reading files into documents, the split, and every way the input can be wrong."""

import gzip
import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe.config import DataConfig
from moe.data import corpus as corpus_lib
from moe.data.corpus import Document, load_corpus
from moe.errors import UserError


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def load(*paths, **kwargs):
  return load_corpus(DataConfig(paths=','.join(map(str, paths)), **kwargs))


def documents(corpus):
  return dict(corpus.train + corpus.val)


def jsonl(*texts, key='text'):
  return '\n'.join(json.dumps({key: text}) for text in texts)


@pytest.fixture
def folder(tmp_path):
  for i in range(20):
    write(tmp_path / f'corpus/{"abc"[i % 3]}/{i}.txt', f'text {i}\n')
  return tmp_path / 'corpus'


def test_split_follows_hash_of_names_and_keeps_order(folder):
  corpus = load(folder, val_fraction=0.2)
  names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.txt'))
  val = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:4]
  assert [d.name for d in corpus.val] == val
  assert [d.name for d in corpus.train] == [name for name in names if name not in val]
  assert all(d.text == (folder / d.name).read_bytes() for d in corpus.train + corpus.val)
  assert corpus.train_bytes + corpus.val_bytes == sum(p.stat().st_size for p in folder.rglob('*.txt'))


@pytest.mark.parametrize(('fraction', 'num_val'), [(0.001, 1), (0.5, 10), (0.999, 19)])
def test_both_splits_have_documents(folder, fraction, num_val):
  corpus = load(folder, val_fraction=fraction)
  assert (len(corpus.val), len(corpus.train)) == (num_val, 20 - num_val)


def test_independent_of_file_system_order_and_place(folder, tmp_path, monkeypatch):
  first = load(folder)
  folder = folder.rename(tmp_path / 'elsewhere')
  walk = os.walk
  monkeypatch.setattr(
    os, 'walk', lambda *args, **kwargs: reversed([(t, d, f[::-1]) for t, d, f in walk(*args, **kwargs)])
  )
  second = load(folder)
  assert (first.train, first.val, first.digest) == (second.train, second.val, second.digest)
  assert first.name.endswith('corpus')


def test_digest_depends_on_names_texts_and_split():
  a, b, ab = Document('a', b'x'), Document('b', b'y'), Document('ab', b'x')
  corpora = [
    ([a], [b]),
    ([b], [a]),
    ([a, b], []),
    ([ab], [b]),
    ([Document('a', b'z')], [b]),
    ([Document('', b'ax')], [b]),
  ]
  digests = {corpus_lib.Corpus(train, val, '').digest for train, val in corpora}
  assert len(digests) == len(corpora)
  assert corpus_lib.Corpus([a], [b], 'name').digest == corpus_lib.Corpus([a], [b], 'other').digest


def test_files_folders_and_globs_together_count_each_file_once(folder, tmp_path):
  write(tmp_path / 'extra.md', '# extra')
  write(tmp_path / 'corpus/a/ignored.csv', b'\0')
  corpus = load(folder / 'a', folder / 'a/0.txt', f' {folder}/**/1*.txt', tmp_path / 'extra.md')
  expected = {f'corpus/{p.relative_to(folder).as_posix()}' for p in folder.rglob('*.txt')}
  expected = {name for name in expected if name.startswith('corpus/a/') or Path(name).name[0] == '1'}
  assert documents(corpus).keys() == expected | {'extra.md'}


def test_name_with_glob_characters_is_a_file(tmp_path):
  file = write(tmp_path / 'a[1].txt', 'one\ntwo\n')
  assert documents(load(file)).keys() == {'a[1].txt', 'a[1].txt#end'}


def test_empty_files_in_folders_are_skipped(folder):
  write(folder / 'a/empty.py', '')
  assert len(documents(load(folder))) == len(documents(load(f'{folder}/**'))) == 20


@pytest.mark.parametrize('pack', [lambda x: x, gzip.compress])
def test_jsonl_records_are_documents(tmp_path, pack):
  name = 'a.jsonl' if pack(b'') == b'' else 'a.jsonl.gz'
  content = jsonl('zero', 'é\u2028x', '', 'three', key='body') + '\r\n\n' + jsonl('four', key='body') + '\n'
  file = write(tmp_path / name, pack(content.encode()))
  found = documents(load(file, text_key='body'))
  assert found == {f'{name}#{i}': t.encode() for i, t in {0: 'zero', 1: 'é\u2028x', 3: 'three', 4: 'four'}.items()}


def test_parquet_rows_are_documents(tmp_path):
  table = pyarrow.table({'id': [1, 2, 3], 'text': ['one', '', 'thrée']})
  pyarrow.parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=1)
  assert documents(load(tmp_path / 'a.parquet')) == {'a.parquet#0': b'one', 'a.parquet#2': 'thrée'.encode()}


def test_lone_document_is_cut_at_newline(tmp_path):
  text = b''.join(b'line %d\n' % i for i in range(100))
  corpus = load(write(tmp_path / 'a.txt', text), val_fraction=0.1)
  ((train_name, train),), ((val_name, val),) = corpus.train, corpus.val
  assert (train_name, val_name) == ('a.txt', 'a.txt#end')
  assert train + val == text
  assert train.endswith(b'\n')
  assert len(text) * 0.1 <= len(val) <= len(text) * 0.1 + 8


@pytest.mark.parametrize('fraction', [0.01, 0.1, 0.25, 0.5, 0.7])
def test_lone_document_is_cut_between_characters(tmp_path, fraction):
  text = 'a€😀é' * 300 + '\n'  # the only newline ends the text
  corpus = load(write(tmp_path / 'a.txt', text), val_fraction=fraction)
  train, val = corpus.train[0].text.decode(), corpus.val[0].text.decode()
  assert train + val == text
  assert len(val.encode()) == pytest.approx(fraction * len(text.encode()), abs=4)


def test_standard_library():
  corpus = load_corpus(DataConfig())
  assert corpus.name == f'Python {sys.version_info.major}.{sys.version_info.minor} standard library'
  found = documents(corpus)
  root = Path(sysconfig.get_path('stdlib'))
  for name in ('argparse.py', 'json/decoder.py'):
    assert found[name] == (root / name).read_bytes()
  assert len(corpus.val) == round(0.05 * len(found))
  assert not [name for name in found if 'site-packages' in name or '__pycache__' in name or not name.endswith('.py')]
  assert all(text and text.decode('utf-8') and b'\0' not in text for text in found.values())


BAD_FILES = {
  'empty.txt': (b'', 'is empty'),
  'empty.jsonl.gz': (b'', 'is empty'),
  'image.png': (b'x', 'unsupported suffix'),
  'nul.txt': (b'a\0b', 'NUL byte at offset 1'),
  'latin.py': (b'# \xe9t\xe9', 'not UTF-8 text.*offset 2'),
  'nul.jsonl.gz': (gzip.compress(b'\0'), 'NUL byte'),
  'cut.jsonl.gz': (gzip.compress(jsonl('a' * 99).encode())[:-9], 'not a complete gzip'),
  'plain.jsonl.gz': (jsonl('a').encode(), 'not a complete gzip'),
  'broken.jsonl': (jsonl('a') + '\n{"text": "b"', r'broken\.jsonl:2 is no valid JSON'),
  'deep.jsonl': ('[' * 100_000, r'deep\.jsonl:1 is no valid JSON'),
  'list.jsonl': ('\n\n["text"]', r'list\.jsonl:3 holds no JSON object'),
  'key.jsonl': (jsonl('a', key='body'), r"key\.jsonl:1 has no field data\.text_key = 'text'"),
  'number.jsonl': (jsonl('a', 7), r'number\.jsonl:2: .*type int'),
  'surrogate.jsonl': ('{"text": "\\ud800"}', r'surrogate\.jsonl:1: .*UTF-8'),
  'nothing.jsonl': (jsonl('', ''), 'no text in .*nothing.jsonl'),
  'one.txt': (b'x', 'one.txt.*too few'),
  'character.txt': ('😀', 'character.txt.*too few'),
  'not.parquet': (b'PAR1 but no more', 'cannot read parquet file .*not.parquet'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_file(tmp_path, name):
  content, message = BAD_FILES[name]
  with pytest.raises(UserError, match=message) as error:
    load(write(tmp_path / name, content))
  assert name in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('values', 'column', 'message'),
  [
    (['a'], 'body', r"no column data\.text_key = 'text'.*'body'"),
    ([1], 'text', r'a\.parquet#0: .*type int'),
  ],
)
def test_bad_parquet(tmp_path, values, column, message):
  pyarrow.parquet.write_table(pyarrow.table({column: values}), tmp_path / 'a.parquet')
  with pytest.raises(UserError, match=message):
    load(tmp_path / 'a.parquet')


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r'pip install "moe-lossfree\[parquet\]"'):
    load(write(tmp_path / 'a.parquet', 'x'))


@pytest.mark.parametrize(
  ('paths', 'message'),
  [
    ('missing.txt', "'missing.txt' of data.paths does not exist"),
    ('missing/*.txt', r"pattern 'missing/\*.txt' of data.paths matches no supported file"),
    ('*.csv', 'matches no supported file'),
    ('tables', "folder 'tables' of data.paths holds no supported file"),
    ('a.txt,,a.txt', 'empty entry'),
    (' ', 'empty entry'),
    ('x' * 300, 'does not exist'),
  ],
)
def test_bad_paths(tmp_path, monkeypatch, paths, message):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / 'a.txt', 'text')
  write(tmp_path / 'a.csv', 'text')
  write(tmp_path / 'tables/a.csv', 'text')
  with pytest.raises(UserError, match=message):
    load(paths)


def test_unreadable_file_and_folder(folder, monkeypatch):
  (folder / 'gone.txt').symlink_to(folder / 'nowhere')
  with pytest.raises(UserError, match=r'cannot read .*gone\.txt'):
    load(folder)

  def scandir(path):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(os, 'scandir', scandir)  # root may list everything, so that chmod would prove nothing
  with pytest.raises(UserError, match=r'cannot list folder .*corpus.*Permission denied'):
    load(folder)
