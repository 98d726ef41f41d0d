"""What a run makes of its text before it trains: packed rows, baselines, and data.json, which says what text it was."""

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import DataConfig
from moe.data import baselines, folder_tokens
from moe.data.batches import Rows, pack
from moe.data.cached import cached
from moe.data.corpus import Corpus
from moe.data.documents import Document
from moe.data.tokenizer import ByteTokenizer, Tokenizer, load_saved
from moe.errors import UserError
from moe.files import digests, read_bytes, read_json, write_json

COSTS = ('trigram_bits_per_byte', 'gzip_bits_per_byte')
TYPES = {'digest': str, 'corpus': str, 'tokenizer': str, 'tokenizer_digest': str, 'train_bytes': int, 'val_bytes': int}
SAMPLES, SAMPLE_BYTES = 64, 1024  # pieces of text that are decoded again


def pack_splits(corpus: Corpus, tokenizer: Tokenizer, data: DataConfig) -> dict[str, Rows]:
  """The packed 'train' and 'val' text. Encoded text is kept, unless it is bytes, which takes no time to encode.

  Raises:
    UserError: a split is shorter than one row, or what is to be kept cannot be written.
  """

  def rows(split, documents, what):
    if isinstance(tokenizer, ByteTokenizer):
      return pack(documents, tokenizer, data.seq_len, what)
    keep = functools.partial(cached, data, f'tokens-{tokenizer.digest}-{corpus.digest}-{split}')
    return pack(documents, tokenizer, data.seq_len, what, keep)

  return {
    'train': rows('train', corpus.train, 'the training text'),
    'val': rows('val', corpus.val, 'the validation text'),
  }


def costs(corpus: Corpus, data: DataConfig) -> dict[str, float]:
  """Bits per byte of the validation text under each of COSTS; kept, since the trigram takes seconds."""
  make = lambda: {
    'trigram_bits_per_byte': baselines.trigram_bits_per_byte(corpus.train, corpus.val),
    'gzip_bits_per_byte': baselines.gzip_bits_per_byte(corpus.val),
  }
  fits = lambda values: all(name in values and _is_cost(values[name].tolist()) for name in COSTS)
  values = cached(data, f'baselines-{corpus.digest}', make, fits)
  return {name: float(values[name]) for name in COSTS}


def lost_share(tokenizer: Tokenizer, documents: Sequence[Document]) -> float:
  """Share of pieces of text, spread over all, that `tokenizer` does not give back as they were; 0 to 1.

  Bits per byte compare with nothing where text is lost: what an unknown word or a lower-cased letter was is not paid
  for. Spaces at the ends of a piece, which some tokenizers add and take away again, do not count.
  """
  ends = np.cumsum([len(document.text) for document in documents])
  lost = 0
  for at in (2 * np.arange(SAMPLES) + 1) * ends[-1] // (2 * SAMPLES):
    i = int(np.searchsorted(ends, at, side='right'))
    size = len(documents[i].text)
    first = max(0, min(int(at - ends[i]) + size, size - SAMPLE_BYTES))
    piece = _whole_words(documents[i].text, first, first + SAMPLE_BYTES).decode('utf-8', 'ignore')
    lost += tokenizer.decode(tokenizer.encode(piece.encode())).strip(' ') != piece.strip(' ')
  return lost / SAMPLES


def _whole_words(text: bytes, first: int, end: int) -> bytes:
  """text[first:end] from its first space on and up to its last one, unless the text itself begins or ends there."""
  piece = text[first:end]
  if first:
    piece = piece.split(None, 1)[-1] if piece.strip() else b''
  return piece.rsplit(None, 1)[0] if end < len(text) and piece.strip() else piece


def describe(path: Path, corpus: Corpus, tokenizer: Tokenizer, rows: dict[str, Rows], data: DataConfig) -> list[str]:
  """Writes data.json and tokenizer.json of the run in folder `path`, or checks that it began with the same.

  Of an older data.json only the digests are believed; what it lacks is made again.

  Args:
    path: run directory.
    corpus: what the run reads.
    tokenizer: that encoded it.
    rows: 'train' and 'val', of that text.
    data: its cache keeps the baselines' bits per byte, which take seconds to compute.

  Returns:
    Lines for the user.

  Raises:
    UserError: the run began with other text or another tokenizer, data.json is damaged, or nothing can be written.
  """
  file = path / 'data.json'
  old = _read(file) if os.path.lexists(file) else {}
  _check_same(path, old, corpus, tokenizer)
  new = {
    'corpus': corpus.name,
    'digest': corpus.digest,
    'tokenizer': tokenizer.name,
    'tokenizer_digest': tokenizer.digest,
    'train_bytes': corpus.train_bytes,
    'val_bytes': corpus.val_bytes,
    'train_tokens': rows['train'].num_targets,
    'val_tokens': rows['val'].num_targets,
    'null_records': corpus.num_nulls,
    'tokenizer_loses': lost_share(tokenizer, corpus.val),
  }
  known = {name: old.get(name) for name in COSTS}
  new |= known if all(map(_is_cost, known.values())) else costs(corpus, data)
  if new != old:  # first: whoever is killed before the tokenizer is there finds its digest, and writes it again
    write_json(file, new)
  if _own_digest(path) != tokenizer.digest or digests.damage(path, ['tokenizer.json']):
    tokenizer.save(path / 'tokenizer.json')
    folder_tokens.seal(path)
  return _lines(path, old, new)


def check_text(path: Path, corpus: Corpus) -> None:
  """Raises UserError if the run in folder `path` says that it trained on another text or split than `corpus`.

  What is validation text here may be training text there: a file more is enough to split the text otherwise.
  """
  file = path / 'data.json'
  if os.path.lexists(file):
    _check_same_text(path, _read(file), corpus, 'name the text to evaluate on')


def _lines(path: Path, old: dict, new: dict) -> list[str]:
  megabytes = (new['train_bytes'] + new['val_bytes']) / 1e6
  trigram, gzip = (new[name] for name in COSTS)
  lines = [
    f'corpus: {new["corpus"]}, {megabytes:.1f} MB; on its validation split a byte trigram takes '
    f'{trigram:.3f} bits/byte, gzip {gzip:.3f}'
  ]
  if old.get('corpus', new['corpus']) != new['corpus']:
    lines.append(f'the text was {old["corpus"]} before; it has moved, and is the same')
  if not old and (path / 'metrics.jsonl').exists():
    lines.append(f'{path / "data.json"} was missing: whether the text is the one that the run began with is not known')
  if new['null_records']:
    lines.append(f'{new["null_records"]:,} records were left out: their text is null')
  if new['tokenizer_loses']:
    lines.append(
      f'tokenizer {new["tokenizer"]} loses text: {new["tokenizer_loses"]:.0%} of a sample do not come back from '
      'decode(encode(text)); bits/byte then compare with no trigram, gzip or other tokenizer'
    )
  return lines


def _read(file: Path) -> dict[str, Any]:
  """data.json of a run. Raises UserError if it cannot say which text that was."""
  old = read_json(file)
  for key, kind in TYPES.items():
    if type(old.get(key)) is not kind and (key in old or key == 'digest'):
      raise UserError(
        f'{file} is damaged: {key} is {repr(old.get(key))[:40]}, not of type {kind.__name__}; restore it, or delete it '
        'if the text is still the one that the run began with'
      )
  return old


def _check_same_text(path: Path, old: dict, corpus: Corpus, otherwise: str):
  if old['digest'] != corpus.digest:
    size = f', {old["train_bytes"] + old["val_bytes"]:,} bytes' if {'train_bytes', 'val_bytes'} <= old.keys() else ''
    begun = f'{old.get("corpus", "unnamed")[:100]}{size}'
    raise UserError(f'the run in {path} began with other text ({begun}); restore it or {otherwise}')


def _check_same(path: Path, old: dict, corpus: Corpus, tokenizer: Tokenizer):
  if old:
    _check_same_text(path, old, corpus, 'choose another workdir')
  kept, own, file = old.get('tokenizer_digest'), _own_digest(path), path / 'tokenizer.json'
  if tokenizer.digest == kept or (kept is None and own is None):
    return
  # Runs of older versions kept no digest, and another version of the library may spell the same tokenizer otherwise.
  begun = (None, own, own and _own_digest(path, str(tokenizer.bos_id)))  # the latter: where a folder names BOS
  if own is None or kept not in begun or load_saved(file).digest != tokenizer.digest:
    raise UserError(
      f'the run in {path} began with another tokenizer ({old.get("tokenizer", file)}) than this {tokenizer.name}; '
      'restore it or choose another workdir'
    )


def _own_digest(path: Path, bos: str = '') -> str | None:
  """sha256 (hex) of the run's tokenizer.json as it was saved, and of `bos` behind it; None if there is none."""
  file = path / 'tokenizer.json'
  return hashlib.sha256(read_bytes(file) + bos.encode()).hexdigest() if os.path.lexists(file) else None


def _is_cost(value) -> bool:
  return type(value) is float and math.isfinite(value) and value > 0
