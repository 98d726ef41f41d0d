"""Packing loses nothing and counts every target once; batches depend on seed and step only."""

import math

import numpy as np
import pytest

from moe.data import batches as batches_lib
from moe.data.batches import Batches, Rows, pack
from moe.data.corpus import Corpus, Document
from moe.data.tokenizer import ByteTokenizer, train_bpe
from moe.errors import UserError

BOS = 256
TEXTS = [b'hello', b'', b'a', b'the second long document', b'\xc3\xa9', b'end of it all']
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]


def stream(texts):
  """(token, document number) pairs, the slow way."""
  return [(token, d) for d, text in enumerate(texts) for token in (BOS, *text)]


def numbered(num_rows, seq_len=4):
  """Rows whose first token tells which row it is."""
  return Rows(np.arange(num_rows * seq_len + 1, dtype=np.int32), np.array([0]), seq_len, num_rows * seq_len)


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('seq_len', [2, 3, 7, 25, 50, len(stream(TEXTS)) - 1])
def test_rows_reconstruct_the_stream(seq_len):
  rows = pack(DOCUMENTS, ByteTokenizer(), seq_len)
  tokens = stream(TEXTS)
  assert len(rows) == math.ceil((len(tokens) - 1) / seq_len)
  targets = []
  for i in range(len(rows)):
    row = rows[i]
    assert all(x.dtype == np.int32 and x.shape == (seq_len + 1,) for x in row.values())
    expected = tokens[i * seq_len : i * seq_len + seq_len + 1]
    first = expected[0][1]
    padding = [0] * (seq_len + 1 - len(expected))
    assert row['token_S'].tolist() == [token for token, _ in expected] + padding
    assert row['segment_S'].tolist() == [d - first + 1 for _, d in expected] + padding
    segment = row['segment_S']
    counted = (segment[1:] == segment[:-1]) & (segment[1:] > 0)
    targets += row['token_S'][1:][counted].tolist()
  assert bytes(targets) == b''.join(TEXTS)  # each byte is a target exactly once, in order, and no BOS is
  assert rows.num_targets == len(targets) == rows.num_bytes
  assert rows.bytes_of(np.arange(len(rows))) == rows.num_bytes


def test_row_ending_with_the_stream_is_not_followed_by_another():
  rows = pack([Document('a', b'1234')], ByteTokenizer(), 2)
  assert [rows[i]['token_S'].tolist() for i in range(len(rows))] == [[BOS, 49, 50], [50, 51, 52]]
  for i in (-1, 2):
    with pytest.raises(IndexError):
      rows[i]


def test_pack_bpe_in_chunks(monkeypatch):
  tokenizer = train_bpe(Corpus(DOCUMENTS, [], ''), 270)
  whole = pack(DOCUMENTS, tokenizer, 4)
  monkeypatch.setattr(batches_lib, 'CHUNK_BYTES', 3)
  assert np.array_equal(pack(DOCUMENTS, tokenizer, 4).token_N, whole.token_N)
  bounds = [*whole.document_starts, len(whole.token_N)]
  for text, lo, hi in zip(TEXTS, bounds[:-1], bounds[1:], strict=True):
    assert whole.token_N[lo] == tokenizer.bos_id
    assert tokenizer.decode(whole.token_N[lo + 1 : hi]).encode() == text
  assert whole.num_targets == len(whole.token_N) - len(TEXTS)
  assert whole.num_targets < whole.num_bytes


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(65536, np.uint16), (65537, np.int32)])
def test_stream_dtype_holds_every_id(vocab_size, dtype):
  class Large(ByteTokenizer):
    bos_id = vocab_size - 1

  Large.vocab_size = vocab_size
  rows = pack(DOCUMENTS, Large(), 4)
  assert rows.token_N.dtype == dtype
  assert rows[0]['token_S'][0] == vocab_size - 1


def test_corpus_shorter_than_a_row():
  assert len(pack([Document('a', b'12345')], ByteTokenizer(), 5)) == 1
  with pytest.raises(UserError, match=r'longer than the validation text: data\.seq_len = 6 needs 7 .* only 6'):
    pack([Document('a', b'12345')], ByteTokenizer(), 6, 'the validation text')
  with pytest.raises(UserError, match='only 0'):
    pack([], ByteTokenizer(), 6)


def test_padded_rows():
  rows = pack(DOCUMENTS, ByteTokenizer(), 7)
  chosen = [2, 4]
  batch = rows.padded_rows(chosen, 5)
  assert {x.shape for x in batch.values()} == {(5, 8)}
  assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)}
  for b, i in enumerate(chosen):
    assert np.array_equal(batch['token_BS'][b], rows[i]['token_S'])
    assert np.array_equal(batch['segment_BS'][b], rows[i]['segment_S'])
  assert not batch['segment_BS'][2:].any()
  assert not batch['token_BS'][2:].any()


@pytest.mark.parametrize(('num_rows', 'batch_size'), [(1, 3), (12, 4), (13, 4), (100, 7)])
def test_every_epoch_holds_each_row_once(num_rows, batch_size):
  batches = Batches(numbered(num_rows), batch_size, 5)
  steps = -(-3 * num_rows // batch_size)
  order = np.concatenate([batches.rows(s, 0, batch_size)['token_BS'][:, 0] // 4 for s in range(steps)])
  epochs = [order[e * num_rows : (e + 1) * num_rows].tolist() for e in range(3)]
  assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
  assert num_rows == 1 or epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert batches.epoch(steps) == pytest.approx(steps * batch_size / num_rows)


def test_processes_with_parts_equal_one_with_the_whole():
  whole = Batches(numbered(10), 8, 0)
  parts = [Batches(numbered(10), 8, 0) for _ in range(2)]
  for step in range(4):
    halves = [part.rows(step, 4 * p, 4 * p + 4) for p, part in enumerate(parts)]
    assert same(whole.rows(step, 0, 8), {key: np.concatenate([half[key] for half in halves]) for key in halves[0]})


def test_batch_depends_on_seed_and_step_only():
  rows = pack(DOCUMENTS, ByteTokenizer(), 3)
  used, other = Batches(rows, 4, 7), Batches(rows, 4, 8)
  for step in (9, 0, 1000, 3, 3):
    used.rows(step, 1, 3)
  fresh = Batches(rows, 4, 7)
  assert same(used.rows(5, 0, 4), fresh.rows(5, 0, 4))
  assert same(used.rows(10**12, 0, 4), fresh.rows(10**12, 0, 4))
  assert not same(used.rows(5, 0, 4), other.rows(5, 0, 4))
  assert not same(used.rows(5, 0, 4), used.rows(6, 0, 4))
  batch = fresh.rows(0, 0, 4)
  assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
    'token_BS': ((4, 4), np.int32),
    'segment_BS': ((4, 4), np.int32),
  }


@pytest.mark.parametrize('arguments', [(-1, 0, 4), (0, -1, 2), (0, 2, 5), (0, 2, 2)])
def test_rows_outside_the_batch(arguments):
  with pytest.raises(ValueError, match='not within a batch of 4'):
    Batches(numbered(9), 4, 0).rows(*arguments)
