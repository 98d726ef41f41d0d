"""What text costs without a neural network, in bits per byte: an interpolated byte trigram and gzip."""

import gzip
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe.data.corpus import Document
from moe.errors import UserError

START = 256  # stands for the bytes before a document
SHAPE = (257, 257, 256)  # the two bytes before (257 symbols each), the byte itself
CHUNK = 1 << 22  # positions counted at once; bounds memory
NUM_BUCKETS = 64  # of contexts: 0 if never seen, else 1 + floor(log2(times seen))
EM_STEPS = 60  # on 30 MB of Python, 200 give the same to 1e-4 bits per byte


def trigram_bits_per_byte(train: Sequence[Document], val: Sequence[Document]) -> float:
  """Cost of `val` in bits per byte under a byte trigram model of `train`; see `Trigram.fit`.

  Needs about 0.6 GB; 30 MB take a few seconds. Raises UserError if either has no text.
  """
  _num_bytes(train)
  num_bytes = _num_bytes(val)
  codes, times = _distinct(count_trigrams(val))
  return float(times @ -np.log2(Trigram.fit(train).probability(codes))) / num_bytes


def gzip_bits_per_byte(val: Sequence[Document]) -> float:
  """Size of all texts gzipped together at level 9, in bits per byte of text. Raises UserError without text."""
  num_bytes = _num_bytes(val)
  return 8 * len(gzip.compress(b''.join(document.text for document in val), 9, mtime=0)) / num_bytes


def _num_bytes(documents: Sequence[Document]) -> int:
  num_bytes = sum(len(document.text) for document in documents)
  if not num_bytes:
    raise UserError('a baseline needs at least one byte of text in both splits')
  return num_bytes


def count_trigrams(documents: Sequence[Document]) -> np.ndarray:
  """How often each byte follows each two symbols, int64 [257, 257, 256]; START, START precede every document."""
  counts = np.zeros(math.prod(SHAPE), np.int64)
  for symbols in _streams(documents):
    for first in range(0, len(symbols) - 2, CHUNK):
      part = symbols[first : first + CHUNK + 2].astype(np.int64)
      code = (part[:-2] * SHAPE[1] + part[1:-1]) * SHAPE[2] + part[2:]
      counts += np.bincount(code[part[2:] != START], minlength=len(counts))
  return counts.reshape(SHAPE)


def _streams(documents: Sequence[Document]) -> Iterator[np.ndarray]:
  """Symbols, uint16 [symbols], of runs of documents, each document after two STARTs."""
  parts, size = [], 0
  for document in documents:
    parts += [np.full(2, START, np.uint16), np.frombuffer(document.text, np.uint8).astype(np.uint16)]
    size += len(document.text)
    if size >= CHUNK:
      yield np.concatenate(parts)
      parts, size = [], 0
  if parts:
    yield np.concatenate(parts)


def _distinct(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Codes of the trigrams that occur, int64 [trigrams], and how often each does."""
  codes = np.flatnonzero(counts)
  return codes, counts.ravel()[codes]


@dataclass(frozen=True, eq=False)
class Trigram:
  """p_n = w_n[bucket] * c(context, byte) / c(context) + (1 - w_n[bucket]) * p_{n-1}, down to p_0 = 1/256."""

  counts: np.ndarray  # [257, 257, 256], from count_trigrams
  weights: np.ndarray  # float64 [3, NUM_BUCKETS]: w of unigram, bigram, trigram, by bucket of the context's count

  @classmethod
  def fit(cls, train: Sequence[Document]) -> 'Trigram':
    """Counts from all of `train`; weights by EM on a tenth of it, under counts from the other nine tenths.

    The tenth are the last documents in order of the sha256 of their names, at least one, or the last tenth of the
    bytes of a lone document.
    """
    rest, held = _split(train)
    codes, times = _distinct(count_trigrams(held))
    weights = _em(*_levels(count_trigrams(rest), codes), times)
    return cls(count_trigrams(train), weights)

  def probability(self, codes: np.ndarray) -> np.ndarray:
    """Probability of the last byte of each trigram `codes` = (a * 257 + b) * 256 + byte, float64 [trigrams]."""
    ratios, buckets = _levels(self.counts, codes)
    return _mix(ratios, [w[bucket] for w, bucket in zip(self.weights, buckets, strict=True)])[-1]


def _split(train: Sequence[Document]) -> tuple[list[Document], list[Document]]:
  """Nine tenths of `train` and the held-out tenth."""
  if len(train) == 1:
    ((name, text),) = train
    cut = len(text) - max(1, len(text) // 10)
    return [Document(name, text[:cut])], [Document(name, text[cut:])]
  by_hash = sorted(train, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
  cut = len(train) - max(1, len(train) // 10)
  return by_hash[:cut], by_hash[cut:]


def _levels(counts: np.ndarray, codes: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """For unigram, bigram and trigram: c(context, byte) / c(context) and the context's bucket, each [trigrams]."""
  a, b, byte = np.unravel_index(codes, SHAPE)
  pairs = counts.sum(0)
  levels = (
    (pairs.sum(0)[byte], np.broadcast_to(pairs.sum(), codes.shape)),
    (pairs[b, byte], pairs.sum(1)[b]),
    (counts.ravel()[codes], counts.sum(2)[a, b]),
  )
  ratios = [seen / np.maximum(context, 1) for seen, context in levels]
  buckets = [np.frexp(context)[1] for _, context in levels]  # the exponent is the bit length of a count
  return ratios, buckets


def _mix(ratios, weights) -> list[np.ndarray]:
  """p_0 .. p_3 of each trigram."""
  mixed = [np.full(len(ratios[0]), 1 / 256)]
  for ratio, weight in zip(ratios, weights, strict=True):
    mixed.append(weight * ratio + (1 - weight) * mixed[-1])
  return mixed


def _em(ratios, buckets, times: np.ndarray) -> np.ndarray:
  """Weights [3, NUM_BUCKETS] that make the held-out trigrams, seen `times` each, most likely."""
  weights = np.full((3, NUM_BUCKETS), 0.5)
  weights[:, 0] = 0  # nothing is known of a context never seen
  for _ in range(EM_STEPS):
    chosen = [w[bucket] for w, bucket in zip(weights, buckets, strict=True)]
    mixed = _mix(ratios, chosen)
    reach = times.astype(np.float64)  # how often this level is reached from above
    for n in (2, 1, 0):
      stop = reach * chosen[n] * ratios[n] / mixed[n + 1]
      weights[n] = _estimate(buckets[n], stop, reach)
      reach = reach - stop
  return weights


def _estimate(bucket: np.ndarray, stop: np.ndarray, reach: np.ndarray) -> np.ndarray:
  """Share of `reach` that stops, by bucket, [NUM_BUCKETS]; a bucket without data takes its lower neighbour's."""
  stops, total = (np.bincount(bucket, x, NUM_BUCKETS) for x in (stop, reach))
  weight = (stops + 1) / (total + 2)  # one pseudo-count each: never 0 or 1, so that no byte is impossible
  weight[0] = 0
  for k in range(2, NUM_BUCKETS):
    if total[k] == 0:
      weight[k] = weight[k - 1]
  return weight
