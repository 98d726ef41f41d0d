"""The trigram against a model in plain dictionaries, and gzip against its own command-line arithmetic."""

import collections
import gzip
import hashlib
import math
import random

import numpy as np
import pytest

from moe.data import baselines
from moe.data.baselines import Trigram, count_trigrams, gzip_bits_per_byte, trigram_bits_per_byte
from moe.data.corpus import Document
from moe.errors import UserError


def make(num_documents, seed, words=('def ', 'self', '.x', ' = ', '\n', 'é', '(', ')')):
  rng = random.Random(seed)
  texts = [''.join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(num_documents)]
  return [Document(f'{seed}-{i}', text.encode()) for i, text in enumerate(texts)]


class Naive:
  """The same model position by position: contexts are tuples, counts and weights dictionaries."""

  def __init__(self, train):
    by_hash = sorted(train, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
    num_held = max(1, len(train) // 10)
    self.count(by_hash[:-num_held])
    self.weights = collections.defaultdict(lambda: 0.5)
    positions = list(self.positions(by_hash[-num_held:]))
    for _ in range(baselines.EM_STEPS):
      self.em_step(positions)
    self.count(train)

  @staticmethod
  def positions(documents):
    """(contexts of length 0, 1, 2; byte) of each byte."""
    for document in documents:
      symbols = [256, 256, *document.text]
      for i in range(2, len(symbols)):
        yield [tuple(symbols[i - n : i]) for n in range(3)], symbols[i]

  def count(self, documents):
    self.seen, self.total = collections.Counter(), collections.Counter()
    for contexts, byte in self.positions(documents):
      for context in contexts:
        self.seen[context, byte] += 1
        self.total[context] += 1

  def bucket(self, context):
    total = self.total[context]
    return (len(context), 1 + math.floor(math.log2(total))) if total else None

  def weight(self, context):
    key = self.bucket(context)
    while key and key[1] > 1 and key not in self.weights:
      key = (key[0], key[1] - 1)
    return self.weights[key] if key else 0

  def levels(self, contexts, byte):
    """(weight * maximum likelihood, mixture) from trigram down to unigram."""
    p, levels = 1 / 256, []
    for context in contexts:
      own = self.weight(context) * self.seen[context, byte] / max(1, self.total[context])
      p = own + (1 - self.weight(context)) * p
      levels.append((own, p))
    return levels[::-1]

  def em_step(self, positions):
    stops, reached = collections.Counter(), collections.Counter()
    for contexts, byte in positions:
      reach = 1.0
      for context, (own, p) in zip(contexts[::-1], self.levels(contexts, byte), strict=True):
        reached[self.bucket(context)] += reach
        stops[self.bucket(context)] += reach * own / p
        reach *= 1 - own / p
    self.weights = collections.defaultdict(lambda: 0.5)
    self.weights |= {key: (stops[key] + 1) / (n + 2) for key, n in reached.items() if key}

  def bits_per_byte(self, val):
    bits = [-math.log2(self.levels(contexts, byte)[0][1]) for contexts, byte in self.positions(val)]
    return sum(bits) / len(bits)


@pytest.mark.parametrize(('num_train', 'seed'), [(2, 0), (25, 1)])
def test_trigram_equals_the_naive_model(num_train, seed):
  train, val = make(num_train, seed), [*make(3, 9), Document('new', 'völlig anders'.encode())]
  assert trigram_bits_per_byte(train, val) == pytest.approx(Naive(train).bits_per_byte(val), rel=1e-9)


def test_counts_do_not_cross_documents_or_depend_on_chunks(monkeypatch):
  documents = make(12, 4)
  counts = count_trigrams(documents)
  naive = collections.Counter((*contexts[2], byte) for contexts, byte in Naive.positions(documents))
  assert {tuple(map(int, code)): counts[tuple(code)] for code in np.argwhere(counts)} == naive
  assert (counts[256, 256].sum(), counts.sum()) == (12, sum(len(d.text) for d in documents))
  monkeypatch.setattr(baselines, 'CHUNK', 50)
  assert np.array_equal(count_trigrams(documents), counts)


@pytest.mark.parametrize('train', [make(1, 2), make(2, 2), make(30, 2), [Document('a', b'x')]])
def test_probabilities_sum_to_one(train):
  model = Trigram.fit(train)
  seen, unseen = train[0].text[:2].ljust(2), b'\xff\xfe'
  for a, b in [(256, 256), (256, seen[0]), tuple(seen), (unseen[0], seen[0]), tuple(unseen)]:
    p = model.probability((a * 257 + b) * 256 + np.arange(256))
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p.min() > 0


def test_costs_of_text_of_known_entropy():
  rng = np.random.default_rng(0)
  noise = [Document(str(i), bytes(rng.choice(list(b'abcdefgh'), 2000).tolist())) for i in range(20)]
  assert trigram_bits_per_byte(noise[:18], noise[18:]) == pytest.approx(3, abs=0.03)
  cycle = [Document(str(i), b'abc' * 1000) for i in range(20)]
  assert trigram_bits_per_byte(cycle[:18], cycle[18:]) < 0.01


def test_higher_orders_help_only_where_they_know_more():
  """A context never seen falls back to the shorter one, and never-seen bytes cost little more than 8 bits."""
  train = make(30, 3)
  model = Trigram.fit(train)
  byte = np.arange(256)
  bigram = model.probability((256 * 257 + ord('=')) * 256 + byte)  # START, '=' never occurs
  trigram = model.probability((ord(' ') * 257 + ord('=')) * 256 + byte)
  assert trigram.argmax() == bigram.argmax() == ord(' ')
  assert trigram[ord(' ')] > bigram[ord(' ')]
  assert (model.weights[:, 0] == 0).all()
  assert ((model.weights >= 0) & (model.weights < 1)).all()


def test_deterministic_and_independent_of_order():
  train, val = make(25, 5), make(4, 6)
  assert trigram_bits_per_byte(train, val) == trigram_bits_per_byte(train[::-1], val[::-1])


def test_gzip():
  documents = [Document('a', b'hello ' * 100), Document('b', b'hello ' * 100)]
  size = len(gzip.compress(b'hello ' * 200, compresslevel=9))
  assert gzip_bits_per_byte(documents) == 8 * size / 1200
  noise = [Document('a', np.random.default_rng(0).bytes(10_000))]
  assert 8 < gzip_bits_per_byte(noise) < 8.1


def test_no_text():
  some, none = make(2, 0), [Document('a', b'')]
  for call in (lambda: gzip_bits_per_byte([]), lambda: trigram_bits_per_byte(some, none)):
    with pytest.raises(UserError, match='at least one byte'):
      call()
  with pytest.raises(UserError, match='at least one byte'):
    trigram_bits_per_byte([], some)
