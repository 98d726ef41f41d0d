"""Evaluation of a part of the text and of all of it, with a model of known losses; how the two are told apart."""

import math

import numpy as np
import pytest

from moe.config import Config, TrainConfig
from moe.data.batches import Rows, pack
from moe.data.corpus import Corpus, Document
from moe.data.tokenizer import train_bpe
from moe.train import evaluate, logbook

WORDS = ['alpha ', 'beta ', 'gamma\n', 'delta = ', '(', 'x', ') ', 'def ', 'return ']
CONFIG = Config(train=TrainConfig(batch_size=8, microbatches=2))


def text(rng, words, size):
  return ''.join(rng.choice(words, size)).encode()


@pytest.fixture(scope='module')
def tokenizer():
  rng = np.random.default_rng(0)
  return train_bpe(Corpus([Document('a', text(rng, WORDS, 3000))], [], ''), 300)


@pytest.fixture(scope='module')
def rows(tokenizer) -> Rows:
  """Long words first, single letters then: tokens of the first rows stand for more bytes than those of the others."""
  rng = np.random.default_rng(1)
  documents = [Document('long', text(rng, WORDS[:4], 600)), Document('short', text(rng, list('qwzk'), 3000))]
  return pack(documents, tokenizer, 16)


def counted(batch):
  """Targets that count, bool [B, S], by the definition of a row."""
  segment_BS = np.asarray(batch['segment_BS'])[0]
  return (segment_BS[:, 1:] == segment_BS[:, :-1]) & (segment_BS[:, 1:] > 0)


def eval_step(params, bias_LE, batch):
  """A model that takes a nat for each token of an even id, and half of one for any other; one router of 4 experts."""
  target_BS, counts_BS = np.asarray(batch['token_BS'])[0][:, 1:], counted(batch)
  nats = (np.where(target_BS % 2, 0.5, 1.0) * counts_BS).sum()
  load_E = np.bincount(target_BS[counts_BS] % 4, minlength=4)
  return {'nats': np.float32([nats]), 'predicted': np.float32([counts_BS.sum()]), 'load_LE': load_E[None]}


class State:
  params, balance = None, {'bias_LE': None}


def measured(rows, mesh_of, sequences=0):
  config = Config(model=CONFIG.model.__class__(mtp_depth=0), train=CONFIG.train)
  return evaluate.evaluate(eval_step, State, rows, config, mesh_of(), sequences)


def targets(rows, i):
  row = rows[i]
  keep = (row['segment_S'][1:] == row['segment_S'][:-1]) & (row['segment_S'][1:] > 0)
  return row['token_S'][1:][keep]


def test_a_part_is_divided_by_its_own_bytes(rows, tokenizer, mesh_of):
  for sequences in (1, 5, 8, 30, len(rows) - 1, len(rows), 10**6, 0):
    found = measured(rows, mesh_of, sequences)
    chosen = rows.spread(sequences)
    assert len(chosen) == (min(sequences, len(rows)) or len(rows))
    ids = np.concatenate([targets(rows, i) for i in chosen])
    num_bytes = sum(len(tokenizer.decode(targets(rows, i)).encode()) for i in chosen)
    nats = np.where(ids % 2, 0.5, 1.0).sum()
    assert (found['val_tokens'], found['val_bytes']) == (len(ids), num_bytes)
    assert found['val_bits_per_byte'] == pytest.approx(nats / math.log(2) / num_bytes)
    assert found['val_loss'] == pytest.approx(nats / len(ids))
    assert np.sum(found['load_LE']) == len(ids)
  assert found['val_bytes'] == rows.num_bytes


def test_bytes_of_the_rows_add_up_to_the_text(rows):
  each = [rows.bytes_of(np.array([i])) for i in range(len(rows))]
  assert sum(each) == rows.num_bytes
  assert each[0] > 1.5 * each[-2]
  near = Rows(rows.token_N, rows.document_starts, rows.seq_len, rows.num_bytes, 3 * rows.token_bytes_V)
  np.testing.assert_allclose([near.bytes_of(np.array([i])) for i in range(len(rows))], each)


@pytest.mark.parametrize(('num_rows', 'sequences'), [(1000, 10), (1000, 999), (7, 3), (1916, 128)])
def test_rows_are_spread_over_the_text(num_rows, sequences):
  rows = Rows(np.zeros(num_rows * 4 + 1, np.int32), np.array([0]), 4, num_rows * 4)
  chosen = rows.spread(sequences)
  assert len(set(chosen.tolist())) == sequences
  # Of each n-th part of the text one row, from its middle.
  np.testing.assert_allclose(chosen + 0.5, (np.arange(sequences) + 0.5) * num_rows / sequences, atol=0.51)


def test_a_part_stands_for_the_whole_of_a_mixed_text(rows, mesh_of):
  whole, part = measured(rows, mesh_of), measured(rows, mesh_of, len(rows) // 8)
  assert part['val_bits_per_byte'] == pytest.approx(whole['val_bits_per_byte'], rel=0.1)
  first = rows.bytes_of(np.arange(len(rows) // 8)) / sum(len(targets(rows, i)) for i in range(len(rows) // 8))
  assert first > 1.5 * whole['val_bytes'] / whole['val_tokens'], 'the first rows would be another text'


class Board:
  def __init__(self, *_):
    self.scalars = []

  def add(self, step, scalars):
    self.scalars += [(tag, value, step) for tag, value in scalars.items()]

  def close(self):
    pass


def test_tensorboard_has_a_curve_for_each_set_of_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(logbook, 'Board', Board)
  log = logbook.Logbook(tmp_path, 0, 8)
  log.write('metrics', {'step': 1, 'loss': 3.0})
  log.write('evals', {'step': 4, 'set': 'sample', 'val_loss': 2.0})
  log.write('evals', {'step': 8, 'set': 'full', 'val_loss': 1.5, 'sample': {'val_loss': 1.0}})
  log.close()
  expected = [('loss', 3.0, 1), ('sample/val_loss', 2.0, 4), ('full/val_loss', 1.5, 8), ('sample/val_loss', 1.0, 8)]
  assert log._board.scalars == expected
