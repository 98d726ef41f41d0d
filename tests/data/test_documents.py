"""How much one file may become, and what of a file of records is text."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe.config import DataConfig
from moe.data import documents
from moe.data.corpus import load_corpus
from moe.errors import UserError

MB = 1 << 20


def load(path):
  return load_corpus(DataConfig(paths=str(path)))


def texts(corpus):
  return {document.name: document.text for document in [*corpus.train, *corpus.val]}


def gzipped(path, piece, times):
  with gzip.open(path, 'wb', 1) as file:
    for _ in range(times):
      file.write(piece)
  return path


def parquet(path, values, **options):
  pyarrow.parquet.write_table(pyarrow.table({'text': values}), path, **options)
  return path


BOMBS = {
  'zeros.jsonl.gz': lambda path: gzipped(path, bytes(MB), 32),
  'lines.jsonl.gz': lambda path: gzipped(path, b'\n' * MB, 32),
  'one.jsonl.gz': lambda path: gzipped(path, json.dumps({'text': 'a' * MB}).encode(), 32),
  'records.jsonl.gz': lambda path: gzipped(path, json.dumps({'text': 'a' * 999}).encode() * 1000, 32),
  'dictionary.parquet': lambda path: parquet(path, pyarrow.array(['a' * MB] * 32).dictionary_encode()),
  'plain.parquet': lambda path: parquet(path, ['a' * MB] * 32, use_dictionary=False, compression='zstd'),
  'prefixes.parquet': lambda path: parquet(
    path,
    [f'{"a" * MB}{i}' for i in range(32)],
    use_dictionary=False,
    column_encoding={'text': 'DELTA_BYTE_ARRAY'},
    compression='zstd',
  ),
  'nulls.parquet': lambda path: parquet(path, pyarrow.nulls(32 * MB, pyarrow.string())),
}


@pytest.mark.parametrize('name', BOMBS)
def test_what_one_file_may_become_is_limited(tmp_path, monkeypatch, name):
  monkeypatch.setattr(documents, 'MIN_EXPANDED_BYTES', 4 * MB)
  file = BOMBS[name](tmp_path / name)
  assert 100 * file.stat().st_size < 28 * MB
  with pytest.raises(UserError, match=rf'{name}.* bytes expands to more than the [\d,]+ allowed'):
    load(file)


def test_text_that_shrinks_as_text_does_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, 'MIN_EXPANDED_BYTES', 1000)
  words = np.random.default_rng(0).choice(['one ', 'two ', 'three ', 'four\n'], (40, 500))
  values = [''.join(row) for row in words]
  lines = ''.join(json.dumps({'text': value}) + '\n' for value in values).encode()
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
  files = [tmp_path / 'a.jsonl.gz', parquet(tmp_path / 'a.parquet', values, row_group_size=7)]
  for encoding in ('PLAIN', 'DELTA_BYTE_ARRAY', 'DELTA_LENGTH_BYTE_ARRAY'):
    options = {'use_dictionary': False, 'column_encoding': {'text': encoding}}
    files.append(parquet(tmp_path / f'{encoding}.parquet', values, **options))
  for file in files:
    assert texts(load(file)) == {f'{file.name}#{i}': value.encode() for i, value in enumerate(values)}


def test_a_file_larger_than_any_memory_is_refused(tmp_path):
  for name in ('sparse.txt', 'sparse.jsonl.gz', 'sparse.parquet'):
    with (tmp_path / name).open('wb') as file:
      file.truncate(1 << 42)
    with pytest.raises(UserError, match=r'has 4,398,046,511,104 bytes; at most'):
      load(tmp_path / name)
    (tmp_path / name).unlink()


def test_null_is_left_out_and_counted(tmp_path):
  values = ['one', None, '', 'two', None, 'three']
  file = tmp_path / 'a.jsonl'
  file.write_text(''.join(json.dumps({'text': value}) + '\n' for value in values))
  for path in (file, parquet(tmp_path / 'a.parquet', values)):
    corpus = load(path)
    assert texts(corpus) == {f'{path.name}#{i}': values[i].encode() for i in (0, 3, 5)}
    assert corpus.num_nulls == 2
  for path in (tmp_path / 'n.jsonl', tmp_path / 'n.parquet'):
    path.write_text('{"text": null}\n') if path.suffix == '.jsonl' else parquet(path, pyarrow.array([None], 'string'))
    with pytest.raises(UserError, match='no text in'):
      load(path)


@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_json(tmp_path, pack):
  file = tmp_path / ('a.jsonl' if pack is bytes else 'a.jsonl.gz')
  file.write_bytes(pack(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n'))
  assert texts(load(file)) == {f'{file.name}#0': b'one', f'{file.name}#1': b'two'}


def test_json_nested_deeply_in_a_line(tmp_path):
  for deep in ('[' * 100_000, '{"text": ' * 100_000, '{"text": ' + '[' * 100_000 + ']' * 100_000 + '}'):
    (tmp_path / 'a.jsonl').write_text(f'{{"text": "a"}}\n{deep}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:2 is no valid JSON: it is nested too deeply') as error:
      load(tmp_path / 'a.jsonl')
    assert len(str(error.value)) < 300
