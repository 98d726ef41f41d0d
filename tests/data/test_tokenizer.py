"""Round trips, the BPE cache, saved tokenizers, and bad tokenizer files."""

import json
import os
import re

import numpy as np
import pytest
import tokenizers

from moe.config import DataConfig
from moe.data import tokenizer as tokenizer_lib
from moe.data.corpus import Corpus, Document
from moe.data.tokenizer import BOS_NAMES, ByteTokenizer, load_saved, load_tokenizer, train_bpe
from moe.errors import UserError

TEXTS = [
  'def add(a, b):\n    return a + b\n' * 20,
  'naïve — 日本 😀\n' * 5,
  'x <|bos|> y <s>',
  ' leading\r\n\ttabs  ',
  '\0',
]
CORPUS = Corpus(
  [Document(str(i), text.encode()) for i, text in enumerate(TEXTS)], [Document('v', b'unseen \xc3\xa9')], ''
)


def bpe_config(tmp_path):
  return DataConfig(tokenizer='bpe', cache_dir=str(tmp_path / 'cache'))


def cache_file(tmp_path):
  (file,) = (tmp_path / 'cache').rglob('*.npz')
  return file


@pytest.fixture(scope='module')
def bpe():
  return train_bpe(CORPUS, 300)


def word_file(path, *words):
  """A tokenizer.json of whole words with ids 0, 10, 20, ..."""
  model = tokenizers.models.WordLevel({word: 10 * i for i, word in enumerate(words)}, unk_token=words[0])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=8)
  tokenizer.save(str(path))
  return str(path)


def test_byte_tokenizer_is_the_bytes():
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(bytes(range(256)))
  assert ids.dtype == np.int32
  assert ids.tolist() == list(range(256))
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.name) == (257, 256, 'byte')
  assert tokenizer.decode([256, 104, 300, -1, 105, 0xFF]) == 'hi\N{REPLACEMENT CHARACTER}'


@pytest.mark.parametrize('text', [*TEXTS, '', 'unseen é'])
def test_round_trip(bpe, text):
  for tokenizer in (ByteTokenizer(), bpe):
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.bos_id not in ids
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_batch_equals_single(bpe):
  texts = [text.encode() for text in TEXTS]
  for tokenizer in (ByteTokenizer(), bpe):
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]


def test_bpe_compresses_and_fills_vocabulary(bpe):
  assert bpe.vocab_size == 300
  assert bpe.name == 'bpe-300'
  assert len(bpe.encode(TEXTS[0].encode())) < len(TEXTS[0]) / 2


def test_bpe_decodes_anything(bpe):
  assert bpe.decode([-1, bpe.bos_id, 300, 10**12, *bpe.encode(b'ok')]) == 'ok'
  assert '\N{REPLACEMENT CHARACTER}' in bpe.decode(bpe.encode('😀'.encode())[:1])


def test_bpe_rejects_broken_utf8(bpe):
  with pytest.raises(UserError, match='needs UTF-8'):
    bpe.encode(b'\xff')


def test_bpe_training_is_deterministic_and_sees_training_text_only(bpe):
  other_val = Corpus(CORPUS.train, [Document('v', b'unseen unseen unseen ' * 50)], '')
  assert train_bpe(CORPUS, 300).to_json() == train_bpe(other_val, 300).to_json() == bpe.to_json()


def test_bpe_is_cached(tmp_path, monkeypatch):
  data = bpe_config(tmp_path)
  first = load_tokenizer(data, 300, CORPUS)
  stamp = cache_file(tmp_path).stat().st_mtime_ns
  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_lib, 'train_bpe', None)
    assert load_tokenizer(data, 300, CORPUS).to_json() == first.to_json()
  assert cache_file(tmp_path).stat().st_mtime_ns == stamp
  load_tokenizer(data, 280, CORPUS)
  load_tokenizer(data, 300, Corpus(CORPUS.train[:-1], CORPUS.val, ''))
  assert len(list((tmp_path / 'cache').rglob('*.npz'))) == 3
  assert not list((tmp_path / 'cache').rglob('*.tmp'))


def test_a_damaged_cached_tokenizer_is_trained_again(tmp_path, capsys):
  data = bpe_config(tmp_path)
  first = load_tokenizer(data, 300, CORPUS)
  file = cache_file(tmp_path)
  file.write_bytes(file.read_bytes()[:100])
  assert load_tokenizer(data, 300, CORPUS).to_json() == first.to_json()
  assert 'made again' in capsys.readouterr().err
  load_tokenizer(data, 300, CORPUS)
  assert not capsys.readouterr().err


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def replace(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', replace)
  with pytest.raises(UserError, match=r'cannot write .*No space left'):
    load_tokenizer(bpe_config(tmp_path), 300, CORPUS)
  assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


def test_unusable_cache_folder(tmp_path):
  (tmp_path / 'cache').write_text('a file')
  with pytest.raises(UserError, match='cannot write'):
    load_tokenizer(bpe_config(tmp_path), 300, CORPUS)


LLAMA = tokenizers.Tokenizer(
  tokenizers.models.BPE(
    {'<s>': 0, '▁': 1, 't': 2, 'h': 3, 'e': 4, '▁t': 5, '▁th': 6, '▁the': 7, '<0xC3>': 8, '<0xA9>': 9},
    [('▁', 't'), ('▁t', 'h'), ('▁th', 'e')],
    byte_fallback=True,
  )
)
LLAMA.normalizer = tokenizers.normalizers.Replace(' ', '▁')


def test_token_bytes_count_what_the_tokens_encode(bpe):
  texts = [text.encode() for text in TEXTS]
  for tokenizer in (ByteTokenizer(), bpe):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert [sizes[ids].sum() for ids in tokenizer.encode_batch(texts)] == [len(text) for text in texts]
    assert not sizes[tokenizer.bos_id]
  llama = tokenizer_lib.JsonTokenizer(LLAMA.to_str())
  ids = llama.encode(' the \N{LATIN SMALL LETTER E WITH ACUTE}e'.encode())
  assert llama.token_bytes()[ids].tolist() == [4, 1, 1, 1, 1]


def growing(normalizer):
  tokenizer = tokenizers.Tokenizer.from_str(LLAMA.to_str())
  tokenizer.normalizer = normalizer
  return tokenizer.to_str()


@pytest.mark.parametrize(
  'normalizer',
  [
    tokenizers.normalizers.Replace('a', 'b' * 10**6),
    tokenizers.normalizers.Prepend('b' * 10**6),
    tokenizers.normalizers.Sequence([tokenizers.normalizers.Replace('a', 'a' * 10)] * 6),
    tokenizers.normalizers.Replace(tokenizers.Regex('x*'), 'b' * 1000),
  ],
)
def test_a_normalizer_that_multiplies_text_is_refused(normalizer):
  with pytest.raises(UserError, match='multiplies text'):
    tokenizer_lib.JsonTokenizer(growing(normalizer))


def test_a_decoder_that_multiplies_text_is_refused():
  found = tokenizers.Tokenizer.from_str(LLAMA.to_str())
  found.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace('e', 'e' * 100)] * 2)
  with pytest.raises(UserError, match='decoder multiplies text'):
    tokenizer_lib.JsonTokenizer(found.to_str())


def test_a_decoder_at_which_the_library_panics(bpe):
  """It takes more characters away than there are."""
  fields = json.loads(bpe.to_json()) | {'decoder': {'type': 'Strip', 'content': 'a', 'start': 0, 'stop': 9}}
  with pytest.raises(UserError, match='tokenizer cannot decode all tokens: index out of bounds'):
    tokenizer_lib.JsonTokenizer(json.dumps(fields)).decode([bpe.token_id('a')])


def test_usual_normalizers_are_not_refused():
  usual = [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁'), tokenizers.normalizers.NFKC()]
  found = tokenizer_lib.JsonTokenizer(growing(tokenizers.normalizers.Sequence(usual)))
  assert found.encode(b'the').tolist() == [7]


@pytest.mark.parametrize('words', [('<s>', 'the'), ('<s>', 'the', 'a')])
def test_words_that_a_tokenizer_cannot_encode(words, tmp_path):
  """Where a file names an unknown token that its vocabulary lacks, the library raises what is no ValueError."""
  path = tmp_path / 'words.json'
  model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]')
  tokenizers.Tokenizer(model).save(str(path))
  with pytest.raises(UserError, match=r'tokenizer cannot encode every text: .*Missing \[UNK\] token'):
    load_saved(path).encode(b'unheard')


def test_files_at_which_the_library_panics(bpe, tmp_path):
  """In a template that names a token it does not describe, and at two tokens of one id: no Exception is raised."""
  path = tmp_path / 'file.json'
  fields = json.loads(bpe.to_json())
  piece = {'SpecialToken': {'id': 'gone', 'type_id': 0}}
  template = {'type': 'TemplateProcessing', 'single': [piece], 'pair': [], 'special_tokens': {}}
  path.write_text(json.dumps(fields | {'post_processor': template}))
  with pytest.raises(UserError, match='tokenizer cannot encode every text: no entry found'):
    load_saved(path)
  vocab = fields['model']['vocab'] | {'t': 0}
  path.write_text(json.dumps(fields | {'model': fields['model'] | {'vocab': vocab}}))
  with pytest.raises(UserError, match='is not a valid tokenizer'):
    load_saved(path)


def test_save_and_restore(bpe, tmp_path):
  words = load_saved(word_file(tmp_path / 'word.json', '<s>', 'a'))
  for tokenizer in (ByteTokenizer(), bpe, words):
    tokenizer.save(tmp_path / 'run/tokenizer.json')
    saved = load_saved(tmp_path / 'run/tokenizer.json')
    assert type(saved) is type(tokenizer)
    assert (saved.name, saved.bos_id, saved.vocab_size) == (tokenizer.name, tokenizer.bos_id, tokenizer.vocab_size)
    assert saved.encode(b'a <s>').tolist() == tokenizer.encode(b'a <s>').tolist()


def test_path_of_a_tokenizer_json(tmp_path):
  """Ids with gaps; the file's own truncation and padding are off; the first known BOS wins."""
  path = word_file(tmp_path / 'word.json', '?', '<|endoftext|>', '<s>', 'hello', 'world')
  tokenizer = load_tokenizer(DataConfig(tokenizer=path), 41, CORPUS)
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.name) == (41, 20, 'wordlevel-41')
  assert tokenizer.encode(b'hello world hello').tolist() == [30, 40, 30]
  assert tokenizer.decode([20, 30, 35, 40]) == 'hello world'


@pytest.mark.parametrize(
  ('name', 'vocab_size', 'message'),
  [
    ('byte', 256, r"'byte' has 257 token ids, more than model\.vocab_size = 256"),
    ('word.json', 40, r'has 41 token ids, more than model\.vocab_size = 40'),
    ('bpe', 257, r'model\.vocab_size of at least 258.*not 257'),
    ('bite', 300, "'bite' does not exist; data.tokenizer is 'byte', 'bpe' or the path"),
    ('.', 300, 'cannot read tokenizer'),
    ('broken.json', 300, "'broken.json' is not a valid tokenizer.json"),
    ('other.json', 300, "'other.json' is not a valid tokenizer.json"),
    ('binary.json', 300, "cannot read tokenizer 'binary.json'"),
    ('nobos.json', 300, "'nobos.json': .*needs one of " + re.escape(' '.join(BOS_NAMES))),
  ],
)
def test_bad_tokenizer(tmp_path, monkeypatch, name, vocab_size, message):
  monkeypatch.chdir(tmp_path)
  word_file('word.json', '?', '<|endoftext|>', '<s>', 'hello', 'world')
  word_file('nobos.json', 'hello')
  (tmp_path / 'broken.json').write_text('{"version": ')
  (tmp_path / 'other.json').write_text(json.dumps({'type': 'letters'}))
  (tmp_path / 'binary.json').write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match=message) as error:
    load_tokenizer(DataConfig(tokenizer=name), vocab_size, CORPUS)
  assert '\n' not in str(error.value)
