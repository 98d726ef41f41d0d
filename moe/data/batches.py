"""Packs documents into rows of one token stream and serves shuffled training and ordered evaluation batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from moe.data.corpus import Document
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError

CHUNK_BYTES = 1 << 22  # text encoded at once: bounds memory, yet occupies every core


@dataclass(frozen=True, eq=False)
class Rows:
  """A token stream cut into rows of `seq_len` targets; a random-access source of `len(rows)` rows.

  Row i holds tokens i*S .. i*S+S. Neighbours overlap by one token, so that every token but the stream's first is a
  target in exactly one row.
  """

  token_N: np.ndarray  # uint16 or int32: every document as BOS and its tokens, one after the other
  document_starts: np.ndarray  # int64 [documents], ascending: where in token_N each BOS is
  seq_len: int  # S
  num_bytes: int  # text bytes that token_N encodes
  token_bytes_V: np.ndarray | None = None  # how many of them each id stands for, see Tokenizer; None: all as many
  names: Sequence[str] = ()  # of the documents; () if not known

  @property
  def num_targets(self) -> int:
    """Tokens that are predicted from a token of their document: all but the BOS's."""
    return len(self.token_N) - len(self.document_starts)

  def spread(self, num_rows: int) -> np.ndarray:
    """Indices of `num_rows` rows at equal distances over the whole stream, int64 [rows], ascending; 0: of all rows."""
    if not 0 < num_rows < len(self):
      return np.arange(len(self))
    return (2 * np.arange(num_rows) + 1) * len(self) // (2 * num_rows)

  def bytes_of(self, chosen: np.ndarray) -> float:
    """Bytes of text that the targets of rows `chosen`, int64 [rows], stand for; `num_bytes` for all rows.

    Exact where `token_bytes_V` is. Where that is near, so is this: its sum over all rows is scaled to `num_bytes`.
    """
    size_N = np.ones(len(self.token_N), np.int32) if self.token_bytes_V is None else self.token_bytes_V[self.token_N]
    size_N[self.document_starts] = 0
    size_R = np.add.reduceat(size_N[1:], np.arange(0, len(size_N) - 1, self.seq_len), dtype=np.int64)
    return float(self.num_bytes * int(size_R[chosen].sum()) / max(1, int(size_R.sum())))

  def __len__(self) -> int:
    return -(-(len(self.token_N) - 1) // self.seq_len)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    """Row i (0 <= i < len): `token_S` and `segment_S`, both int32 [S+1].

    Segments number the documents of the row from 1; past the end of the stream token and segment are 0. Target t+1
    counts where segment_S[t+1] == segment_S[t] > 0.
    """
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    first = int(i) * self.seq_len
    tokens = self.token_N[first : first + self.seq_len + 1]
    document = np.searchsorted(self.document_starts, np.arange(first, first + len(tokens)), side='right')
    row = _padding(1, self.seq_len)
    row['token_BS'][0, : len(tokens)] = tokens
    row['segment_BS'][0, : len(tokens)] = document - document[0] + 1
    return {'token_S': row['token_BS'][0], 'segment_S': row['segment_BS'][0]}

  def padded_rows(self, chosen: Sequence[int] | np.ndarray, num_rows: int) -> dict[str, np.ndarray]:
    """Rows `chosen`, and padding (segment 0) up to `num_rows`: `token_BS` and `segment_BS`, int32 [num_rows, S+1]."""
    batch = _padding(num_rows, self.seq_len)
    for b, i in enumerate(chosen):
      row = self[i]
      batch['token_BS'][b], batch['segment_BS'][b] = row['token_S'], row['segment_S']
    return batch


def pack(
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  seq_len: int,
  what: str = 'the corpus',
  keep: Callable[[Callable, Callable], dict] = lambda encode, fits: encode(),
) -> Rows:
  """Encodes `documents` into one stream and cuts it into rows of `seq_len` targets.

  Args:
    documents: in the order of the stream.
    tokenizer: that encodes them; each begins with its BOS.
    seq_len: targets per row, S: a row has S + 1 tokens.
    what: names the documents in errors, such as 'the validation text'.
    keep: calls its first argument, which encodes, or returns what that gave before, if it `fits`, its second.

  Raises:
    UserError: the stream is shorter than one row.
  """
  stream = keep(lambda: _encode(documents, tokenizer), lambda stream: _fits(stream, len(documents), tokenizer))
  num_tokens = len(stream['token_N'])
  if num_tokens < seq_len + 1:
    raise UserError(
      f'sequence longer than {what}: data.seq_len = {seq_len} needs {seq_len + 1} tokens, but {what} has only '
      f'{num_tokens}; lower data.seq_len or give more text'
    )
  num_bytes = sum(len(document.text) for document in documents)
  names = [document.name for document in documents]
  return Rows(**stream, seq_len=seq_len, num_bytes=num_bytes, token_bytes_V=tokenizer.token_bytes(), names=names)


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """token_N and document_starts of `Rows`."""
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
  parts, lengths = [], []
  for chunk in _chunks(documents):
    for ids in tokenizer.encode_batch([document.text for document in chunk]):
      parts += [np.array([tokenizer.bos_id], dtype), ids.astype(dtype)]
      lengths.append(1 + len(ids))
  return {
    'token_N': np.concatenate([*parts, np.zeros(0, dtype)]),
    'document_starts': np.cumsum([0, *lengths[:-1]], dtype=np.int64),
  }


def _fits(stream: dict[str, np.ndarray], num_documents: int, tokenizer: Tokenizer) -> bool:
  """Whether these are token_N and document_starts of so many documents: ids within range, and a BOS at each start."""
  token_N, starts = stream['token_N'], stream['document_starts']
  if len(starts) != num_documents or token_N.dtype.kind not in 'iu' or starts.dtype.kind != 'i':
    return False
  if not num_documents:
    return not len(token_N)
  if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(token_N):
    return False
  known = 0 <= token_N.min() <= token_N.max() < tokenizer.vocab_size
  return bool(known and (token_N[starts] == tokenizer.bos_id).all())


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
  chunk, size = [], 0
  for document in documents:
    chunk.append(document)
    size += len(document.text)
    if size >= CHUNK_BYTES:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _padding(num_rows: int, seq_len: int) -> dict[str, np.ndarray]:
  return {key: np.zeros((num_rows, seq_len + 1), np.int32) for key in ('token_BS', 'segment_BS')}


class Batches:
  """Endless training batches: every epoch holds each row once, in an order of its own; batches run across epochs."""

  def __init__(self, rows: Rows, batch_size: int, seed: int):
    """Serves `rows` in global batches of `batch_size` rows, in an order that depends on `seed` only."""
    self.batch_size = batch_size
    self.rows_per_epoch = len(rows)
    self._dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()

  def rows(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
    """Rows lo..hi of the global batch of `step` (from 0): `token_BS` and `segment_BS`, int32 [hi-lo, S+1].

    A pure function of (seed, step, lo, hi): processes that each take a part get the same global batch, and resuming
    needs only the step.
    """
    if not (step >= 0 and 0 <= lo < hi <= self.batch_size):
      raise ValueError(f'rows {lo}..{hi} of step {step} are not within a batch of {self.batch_size} rows')
    rows = [self._dataset[step * self.batch_size + b] for b in range(lo, hi)]
    return {f'{key}_BS': np.stack([row[f'{key}_S'] for row in rows]) for key in ('token', 'segment')}

  def epoch(self, step: int) -> float:
    """Passes over the rows before `step`."""
    return step * self.batch_size / self.rows_per_epoch
