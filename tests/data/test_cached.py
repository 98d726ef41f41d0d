"""What is kept on disk of a corpus: made once, and never taken for something else."""

import io
import os
import pwd

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data import baselines, batches, prepare
from moe.data.cached import cache_dir, cached, use_compilation_cache
from moe.data.corpus import Corpus, Document
from moe.data.tokenizer import load_tokenizer
from moe.errors import UserError


@pytest.fixture
def data(tmp_path):
  return DataConfig(tokenizer='bpe', seq_len=8, cache_dir=str(tmp_path / 'cache'))


def corpus(word=b'token'):
  documents = [Document(str(i), b'some %s or other, %d times\n' % (word, i)) for i in range(9)]
  return Corpus(documents[:7], documents[7:], 'text')


def test_is_made_once_for_each_name(data):
  calls = []

  def make():
    calls.append(1)
    return {'a': np.arange(3, dtype=np.uint16), 'b': 0.5}

  for name in ('one', 'one', 'two'):
    found = cached(data, name, make)
    assert found.keys() == {'a', 'b'}
    assert (found['a'].dtype, found['a'].tolist(), float(found['b'])) == (np.uint16, [0, 1, 2], 0.5)
  assert len(calls) == 2


def test_text_is_encoded_once(data, monkeypatch):
  tokenizer = load_tokenizer(data, 300, corpus())
  rows, costs = prepare.pack_splits(corpus(), tokenizer, data), prepare.costs(corpus(), data)
  assert costs['gzip_bits_per_byte'] == baselines.gzip_bits_per_byte(corpus().val)
  monkeypatch.setattr(batches, '_encode', None)
  monkeypatch.setattr(baselines, 'gzip_bits_per_byte', None)
  again = prepare.pack_splits(corpus(), tokenizer, data)
  for split, documents in (('train', corpus().train), ('val', corpus().val)):
    assert again[split].num_bytes == rows[split].num_bytes == sum(len(document.text) for document in documents)
    np.testing.assert_array_equal(again[split].token_N, rows[split].token_N)
    np.testing.assert_array_equal(again[split].document_starts, rows[split].document_starts)
    assert again[split].token_N.dtype == rows[split].token_N.dtype == np.uint16
  assert prepare.costs(corpus(), data) == costs
  for other in (corpus(b'word'), Corpus(corpus().train[1:], corpus().val, 'text')):
    with pytest.raises(TypeError):  # it encodes
      prepare.pack_splits(other, tokenizer, data)
  with pytest.raises(TypeError):
    prepare.pack_splits(corpus(), load_tokenizer(data, 280, corpus()), data)


def damaged_files(file):
  """Contents of a cached file that must not be used."""
  whole, arrays = file.read_bytes(), dict(np.load(file))
  yield from (whole[:500], b'text', b'')
  rng = np.random.default_rng(0)
  for at in rng.integers(0, len(whole), 200):
    yield whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1 :]
  for changed in (
    arrays | {'a': arrays['a'][::-1]},
    arrays | {'a': arrays['a'].astype(np.int32)},
    {key: value for key, value in arrays.items() if key != 'a'},
    {key: value for key, value in arrays.items() if key != 'sha256'},
  ):
    buffer = io.BytesIO()
    np.savez(buffer, **changed)
    yield buffer.getvalue()


def test_a_damaged_file_is_made_again(data, tmp_path, capsys):
  make = lambda: {'a': np.arange(100)}
  cached(data, 'name', make)
  file = tmp_path / 'cache/name.npz'
  for content in damaged_files(file):
    file.write_bytes(content)
    found = cached(data, 'name', make)
    assert found.keys() == {'a'}
    np.testing.assert_array_equal(found['a'], np.arange(100))
  assert capsys.readouterr().err.count('made again') > 150  # some bits of a zip archive mean nothing
  assert file.read_bytes() != content


@pytest.mark.parametrize(
  'change',
  [
    lambda stream: {'token_N': stream['token_N'] + np.uint16(300)},
    lambda stream: {'token_N': stream['token_N'][::-1]},
    lambda stream: {'document_starts': stream['document_starts'][:-1]},
    lambda stream: {'document_starts': stream['document_starts'] + 10**6},
    lambda stream: {'token_N': stream['token_N'].astype(np.float32)},
  ],
)
def test_encoded_text_that_cannot_be_is_encoded_again(data, change):
  """With a digest that is right: whoever wrote it."""
  tokenizer = load_tokenizer(data, 300, corpus())
  name = f'tokens-{tokenizer.digest}-{corpus().digest}-val'
  stream = cached(data, name, lambda: batches._encode(corpus().val, tokenizer))
  cached(data, name, lambda: stream | change(stream), lambda values: False)
  rows = prepare.pack_splits(corpus(), tokenizer, data)['val']
  np.testing.assert_array_equal(rows.token_N, stream['token_N'])


def test_where_the_cache_is(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  assert cache_dir(DataConfig()) == tmp_path / '.cache/moe-lossfree'
  assert cache_dir(DataConfig(cache_dir='~/mine')) == tmp_path / 'mine'
  with pytest.raises(UserError, match=r"config data\.cache_dir = '~nobody-of-that-name/cache': .* without ~"):
    cache_dir(DataConfig(cache_dir='~nobody-of-that-name/cache'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert cache_dir(DataConfig()) == tmp_path / 'xdg/moe-lossfree'


def no_home(monkeypatch, tmp_path):
  def getpwuid(uid):
    raise KeyError(uid)

  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', getpwuid)


def home_is_a_file(monkeypatch, tmp_path):
  (tmp_path / 'home').touch()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))


def home_cannot_be_written(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(os, 'access', lambda path, mode: False)


def disk_is_full(monkeypatch, tmp_path):
  def savez(file, **arrays):
    raise OSError(28, 'No space left on device')

  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(np, 'savez', savez)


@pytest.mark.parametrize('what', [no_home, home_is_a_file, home_cannot_be_written, disk_is_full])
def test_without_a_place_nothing_is_kept_and_nothing_fails(monkeypatch, tmp_path, what):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  what(monkeypatch, tmp_path)
  data = DataConfig(tokenizer='bpe', seq_len=8)
  assert (cache_dir(data) is None) == (what is not disk_is_full)
  tokenizer = load_tokenizer(data, 300, corpus())
  assert prepare.pack_splits(corpus(), tokenizer, data)['train'].num_bytes == corpus().train_bytes
  assert prepare.costs(corpus(), data).keys() == set(prepare.COSTS)
  use_compilation_cache(data)
  assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.name != 'home']


def test_a_failed_write_leaves_nothing(data, tmp_path, monkeypatch):
  def savez(file, **arrays):
    file.write(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', savez)
  with pytest.raises(UserError, match=r'cannot write .*name\.npz.*No space left.*data\.cache_dir'):
    cached(data, 'name', lambda: {'a': 1})
  assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
