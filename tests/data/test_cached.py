"""What is kept on disk of a corpus: made once, and never taken for something else."""

import numpy as np
import pytest

from moe import loop
from moe.config import DataConfig
from moe.data import baselines, batches
from moe.data.cached import cached
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
  rows, costs = loop._rows(corpus(), tokenizer, data), loop._baselines(corpus(), data)
  assert costs['gzip_bits_per_byte'] == baselines.gzip_bits_per_byte(corpus().val)
  monkeypatch.setattr(batches, '_encode', None)
  monkeypatch.setattr(baselines, 'gzip_bits_per_byte', None)
  again = loop._rows(corpus(), tokenizer, data)
  for split, documents in (('train', corpus().train), ('val', corpus().val)):
    assert again[split].num_bytes == rows[split].num_bytes == sum(len(document.text) for document in documents)
    np.testing.assert_array_equal(again[split].token_N, rows[split].token_N)
    np.testing.assert_array_equal(again[split].document_starts, rows[split].document_starts)
    assert again[split].token_N.dtype == rows[split].token_N.dtype == np.uint16
  assert loop._baselines(corpus(), data) == costs
  for other in (corpus(b'word'), Corpus(corpus().train[1:], corpus().val, 'text')):
    with pytest.raises(TypeError):  # it encodes
      loop._rows(other, tokenizer, data)
  with pytest.raises(TypeError):
    loop._rows(corpus(), load_tokenizer(data, 280, corpus()), data)


def test_a_damaged_file_is_named(data, tmp_path):
  cached(data, 'name', lambda: {'a': np.arange(1000)})
  file = tmp_path / 'cache/name.npz'
  for content in (file.read_bytes()[:500], b'text', b''):
    file.write_bytes(content)
    with pytest.raises(UserError, match=r'name\.npz.* is damaged, delete it'):
      cached(data, 'name', dict)


def test_a_failed_write_leaves_nothing(data, tmp_path, monkeypatch):
  def savez(file, **arrays):
    file.write(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', savez)
  with pytest.raises(UserError, match=r'cannot write .*name\.npz.*No space left'):
    cached(data, 'name', lambda: {'a': 1})
  assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
