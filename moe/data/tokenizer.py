"""Text to token ids and back: raw bytes, a BPE trained on the corpus, or any `tokenizer.json`."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from moe.config import DataConfig
from moe.data import folder_tokens
from moe.data.cached import cached
from moe.data.corpus import Corpus
from moe.data.folder_tokens import FolderTokens
from moe.errors import UserError
from moe.files import MAX_JSON_BYTES, parse_json, read_bytes, write_atomically

FILE = 'tokenizer.json'
# A normalizer or decoder may multiply text by so much; Llama's, which marks spaces, doubles it at most.
MAX_GROWTH = 1000
# Taken, in this order, where nothing names the token that starts a document; the first is that of our own BPE.
BOS_NAMES = (
  *('<|bos|>', '<s>', '<|begin_of_text|>', '<｜begin▁of▁sentence｜>'),
  *('<bos>', '[BOS]', '<|startoftext|>', '<|endoftext|>'),
)
CANNOT = 'tokenizer cannot encode every text: '
MIN_BPE_VOCAB = 258  # 256 bytes, BOS and one merge; with less it is the byte tokenizer


class Tokenizer(ABC):
  """Reversible map between UTF-8 text and token ids. BOS starts a document and is added by the caller only."""

  name: str
  vocab_size: int  # largest id + 1
  bos_id: int
  folder: FolderTokens = folder_tokens.NOTHING  # what the folder of its file says of its tokens
  remarks: Sequence[str] = ()  # lines for the user

  @property
  def begin_ids(self) -> tuple[int, ...]:
    """Tokens before a prompt that begins a document."""
    return (self.bos_id,)

  def token_id(self, text: str) -> int | None:
    """The id of the token with this text, special ones too, if there is one."""
    return None

  def token_text(self, id: int) -> str | None:
    """The text of the token with this id, special ones too, if there is one."""
    return None

  @abstractmethod
  def encode(self, text: bytes) -> np.ndarray:
    """Token ids, int32 [tokens], without BOS; text that spells a special token is plain text.

    Raises:
      UserError: `text` is not UTF-8 and the tokenizer works on characters.
    """

  def encode_special(self, text: str) -> list[int]:
    """Token ids of a text in which what spells a special token is one; nothing is added."""
    return list(map(int, self.encode(text.encode())))

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """`encode` of each text, in parallel where the tokenizer can."""
    return [self.encode(text) for text in texts]

  @abstractmethod
  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids` [tokens]; broken UTF-8 becomes U+FFFD, BOS and ids outside the vocabulary become nothing."""

  @abstractmethod
  def token_bytes(self) -> np.ndarray:
    """How many bytes of text each id stands for, int32 [vocab_size]; 0 for BOS and ids without a token.

    Exact for bytes and byte-level BPE; of other kinds of tokens, such as lower-cased words, the length of their names.
    """

  @abstractmethod
  def to_json(self) -> str:
    """What `save` writes."""

  @property
  def digest(self) -> str:
    """sha256 (hex) of `to_json`, and of BOS where a folder names it: of all that encoded documents depend on."""
    return hashlib.sha256((self.to_json() + (str(self.bos_id) if self.folder.texts else '')).encode()).hexdigest()

  def save(self, path: str | Path) -> None:
    """Writes a file, tokenizer.json, from which `load_saved` restores this tokenizer, and beside it `folder`."""
    self.folder.save(Path(path).parent)
    write_atomically(Path(path), self.to_json())


class ByteTokenizer(Tokenizer):
  """Ids 0..255 are bytes, 256 is BOS."""

  name = 'byte'
  vocab_size = 257
  bos_id = 256

  def encode(self, text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return bytes(int(i) for i in ids if 0 <= i < 256).decode('utf-8', errors='replace')

  def token_bytes(self) -> np.ndarray:
    return (np.arange(self.vocab_size) != self.bos_id).astype(np.int32)

  def to_json(self) -> str:
    return json.dumps({'type': 'byte'})


class JsonTokenizer(Tokenizer):
  """A tokenizer of the `tokenizers` library."""

  def __init__(self, text: str, folder: FolderTokens = folder_tokens.NOTHING):
    """Makes it from the contents of a tokenizer.json and what its folder says.

    Raises:
      ValueError: `text` is no tokenizer.json.
      UserError: nothing names BOS and none of BOS_NAMES is there; or as `FolderTokens.bos`.
    """
    with library_errors(ValueError):
      self._tokenizer = tokenizers.Tokenizer.from_str(text)
    for part, what in ((self._tokenizer.normalizer, 'normalizer'), (self._tokenizer.decoder, 'decoder')):
      _check_growth(part, what)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True  # '<s>' within a document must not become a BOS
    self.folder, vocab = folder, self._tokenizer.get_vocab()
    if len(set(vocab.values())) < len(vocab):  # at which the library panics or not, as its hashes fall
      raise ValueError('two tokens have the same id')
    self.bos_id, self.remarks, self._begin_ids = self._bos(vocab)
    self.vocab_size = max(vocab.values()) + 1
    self.name = f'{type(self._tokenizer.model).__name__.lower()}-{self.vocab_size}'

  def _bos(self, vocab):
    """BOS, remarks for the user, and what stands before a prompt."""
    with library_errors(UserError, CANNOT):
      encoding = self._tokenizer.encode('a')
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)  # 1: put there by the template
    of_template = tuple(id for id, _ in itertools.takewhile(lambda pair: pair[1], marked))
    known = lambda id: self.token_text(id) is not None
    bos_id, remarks = self.folder.bos(self.token_id, of_template, known)
    if bos_id is None:
      name = next((name for name in BOS_NAMES if name in vocab), None)
      if name is None:
        names = ' '.join(BOS_NAMES)
        raise UserError(f'tokenizer has no token that could start a document; it needs one of {names}')
      bos_id = vocab[name]
      if name != BOS_NAMES[0]:
        remarks.append(f'nothing says which token starts a document; taken: {name!r}, token {bos_id}')
    return bos_id, remarks, self.folder.begin_ids(bos_id, of_template)

  @property
  def begin_ids(self) -> tuple[int, ...]:
    return self._begin_ids

  def token_id(self, text: str) -> int | None:
    return self._tokenizer.token_to_id(text)

  def token_text(self, id: int) -> str | None:
    return self._tokenizer.id_to_token(id) if 0 <= id < 2**32 else None

  def encode(self, text: bytes) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    try:
      decoded = [text.decode('utf-8') for text in texts]
    except UnicodeDecodeError as error:
      raise UserError(f'tokenizer {self.name} needs UTF-8 text: {error}') from error
    with library_errors(UserError, CANNOT):
      encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode_special(self, text: str) -> list[int]:
    with library_errors(UserError, CANNOT):
      special = tokenizers.Tokenizer.from_str(self.to_json())  # whose encode_special_tokens is False
      return special.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.bos_id]
    with library_errors(UserError, 'tokenizer cannot decode all tokens: '):
      return self._tokenizer.decode(kept, skip_special_tokens=False)

  def token_bytes(self) -> np.ndarray:
    sizes, vocab = np.zeros(self.vocab_size, np.int32), self._tokenizer.get_vocab()
    symbols = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # a character for each byte
    byte_level = symbols <= vocab.keys()
    for name, token in vocab.items():
      if byte_level and symbols.issuperset(name):
        sizes[token] = len(name)
      elif re.fullmatch('<0x[0-9A-F]{2}>', name):  # SentencePiece's bytes
        sizes[token] = 1
      else:
        sizes[token] = len(name.removeprefix('##').replace('▁', ' ').encode())  # WordPiece's and SentencePiece's marks
    sizes[self.bos_id] = 0
    return sizes

  def to_json(self) -> str:
    return self._tokenizer.to_str()


@contextlib.contextmanager
def library_errors(kind: type[Exception], what: str = ''):
  """Around calls of `tokenizers`, which raises plain Exceptions, and for some damaged files what is not even that.

  Args:
    kind: what is raised instead.
    what: begins its message.
  """
  try:
    yield
  except UnicodeError:  # of the text, which is no mistake in the tokenizer
    raise
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':  # which no module exports
      raise
    raise kind(f'{what}{error}') from error


def _check_growth(part, what):
  """Raises UserError if a normalizer or decoder may take memory out of proportion: the library would then abort."""
  growth = _growth(json.loads(part.__getstate__())) if part else 1
  if growth > MAX_GROWTH:
    raise UserError(f'tokenizer whose {what} multiplies text by up to {growth:.3g}; at most {MAX_GROWTH} is allowed')


def _growth(spec: dict) -> float:
  """How many characters a normalizer or decoder, as tokenizer.json spells it, may make of one by what it puts in."""
  if spec['type'] == 'Sequence':
    return math.prod(float(_growth(part)) for part in spec['decoders' if 'decoders' in spec else 'normalizers'])
  matches_nothing = spec['type'] == 'Prepend' or 'Regex' in spec.get('pattern', ())  # so that what was there stays
  return max(1, len(spec.get('content', spec.get('prepend', ''))) + matches_nothing)


def load_tokenizer(data: DataConfig, vocab_size: int, corpus: Corpus) -> Tokenizer:
  """The tokenizer that `data.tokenizer` names, checked to fit a model of `vocab_size` token ids.

  'bpe' is a byte-level BPE of at most `vocab_size` ids, trained on the training documents and `cached`; a corpus with
  too few distinct pairs yields fewer ids.

  Raises:
    UserError: `vocab_size` too small, or a missing, unreadable or invalid tokenizer file.
  """
  if data.tokenizer == 'byte':
    tokenizer: Tokenizer = ByteTokenizer()
  elif data.tokenizer == 'bpe':
    tokenizer = _cached_bpe(data, vocab_size, corpus)
  else:
    tokenizer = load_saved(data.tokenizer)
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f'tokenizer {data.tokenizer!r} has {tokenizer.vocab_size} token ids, more than model.vocab_size = {vocab_size}; '
      f'set model.vocab_size to at least {tokenizer.vocab_size}'
    )
  return tokenizer


def load_saved(path: str | Path) -> Tokenizer:
  """Restores what `Tokenizer.save` wrote, or reads any tokenizer.json, and what its folder says of its tokens.

  Raises:
    UserError: naming `path`, or the file beside it that is damaged.
  """
  path = Path(path).expanduser()
  if not os.path.lexists(path):
    raise UserError(
      f"tokenizer {str(path)!r} does not exist; data.tokenizer is 'byte', 'bpe' or the path of a tokenizer.json"
    )
  try:
    text = read_bytes(path, MAX_JSON_BYTES).decode('utf-8')
  except (UserError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read tokenizer {str(path)!r}: {error}') from error
  if parse_json(text, f'{str(path)!r} is not a valid tokenizer.json: it') == {'type': 'byte'}:
    return ByteTokenizer()
  folder = folder_tokens.read(path.parent) if path.name == FILE else folder_tokens.NOTHING
  try:
    return JsonTokenizer(text, folder)
  except ValueError as error:
    raise UserError(f'{str(path)!r} is not a valid tokenizer.json: {str(error)[:160]}') from error
  except UserError as error:
    raise UserError(f'{str(path)!r}: {error}') from error


def train_bpe(corpus: Corpus, vocab_size: int) -> JsonTokenizer:
  """Byte-level BPE of at most `vocab_size` ids (BOS is id 0) from the training documents; deterministic."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[BOS_NAMES[0]],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator((document.text.decode('utf-8') for document in corpus.train), trainer)
  return JsonTokenizer(tokenizer.to_str())


def _cached_bpe(data: DataConfig, vocab_size: int, corpus: Corpus) -> Tokenizer:
  if vocab_size < MIN_BPE_VOCAB:
    raise UserError(
      f"data.tokenizer = 'bpe' needs model.vocab_size of at least {MIN_BPE_VOCAB} (bytes, BOS and a merge), "
      f'not {vocab_size}'
    )
  make = lambda: {'tokenizer': train_bpe(corpus, vocab_size).to_json()}
  return JsonTokenizer(str(cached(data, f'bpe-{vocab_size}-{corpus.digest}', make)['tokenizer']))
