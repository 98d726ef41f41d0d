"""What a run writes down of its text, and which text and tokenizer it goes on with."""

import hashlib
import json

import pytest
import tokenizers

from moe.config import DataConfig
from moe.data import folder_tokens, prepare
from moe.data.batches import pack
from moe.data.corpus import Corpus, Document
from moe.data.tokenizer import ByteTokenizer, load_saved, train_bpe
from moe.errors import UserError
from moe.files import read_json

DOCUMENTS = [Document(str(i), b'The quick brown fox jumps, %d times\n' % i * 9) for i in range(12)]
CORPUS = Corpus(DOCUMENTS[:9], DOCUMENTS[9:], 'text')
BPE = train_bpe(CORPUS, 300)


def word_tokenizer(path, **changes):
  """A tokenizer.json of four words, which lower-cases and knows no other word."""
  words = {'<s>': 0, '[UNK]': 1, 'the': 2, 'fox': 3} | changes
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  tokenizer.save(str(path))
  return load_saved(path)


def describe(path, corpus=CORPUS, tokenizer=BPE):
  path.mkdir(exist_ok=True)
  rows = {split: pack(docs, tokenizer, 4) for split, docs in (('train', corpus.train), ('val', corpus.val))}
  return prepare.describe(path, corpus, tokenizer, rows, DataConfig(cache_dir=str(path.parent / 'cache')))


def data_of(path):
  return read_json(path / 'data.json')


def change(path, **values):
  kept = {key: value for key, value in (data_of(path) | values).items() if value != 'gone'}
  (path / 'data.json').write_text(json.dumps(kept))


@pytest.fixture
def run(tmp_path):
  describe(tmp_path / 'run')
  return tmp_path / 'run'


def test_data_json_says_what_the_text_was(run):
  found = data_of(run)
  assert (found['corpus'], found['digest'], found['tokenizer']) == ('text', CORPUS.digest, BPE.name)
  assert found['tokenizer_digest'] == BPE.digest
  assert (found['train_bytes'], found['val_bytes']) == (CORPUS.train_bytes, CORPUS.val_bytes)
  assert found['val_tokens'] == sum(len(BPE.encode(document.text)) for document in CORPUS.val)
  assert (found['null_records'], found['tokenizer_loses']) == (0, 0)
  assert load_saved(run / 'tokenizer.json').digest == BPE.digest


def test_the_same_again_changes_nothing(run):
  before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
  (line,) = describe(run)
  assert line.startswith('corpus: text, 0.0 MB')
  assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()} == before


def refused(run, message, **changes):
  before = {path.name: path.read_bytes() for path in run.iterdir()}
  with pytest.raises(UserError, match=message) as error:
    describe(run, **changes)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 400
  assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_other_text_is_refused(run):
  for corpus in (Corpus(DOCUMENTS[:8], DOCUMENTS[9:], 'text'), Corpus(DOCUMENTS[9:], DOCUMENTS[:9], 'text')):
    refused(run, r'began with other text \(text, .* bytes\)', corpus=corpus)


def test_text_that_moved_is_accepted_with_a_remark(run):
  moved = Corpus(CORPUS.train, CORPUS.val, 'elsewhere')
  assert 'the text was text before; it has moved, and is the same' in describe(run, moved)
  assert data_of(run)['corpus'] == 'elsewhere'
  assert len(describe(run, moved)) == 1


@pytest.mark.parametrize('older', [False, True])
@pytest.mark.parametrize('name', ['byte', 'bpe', 'swapped'])
def test_another_tokenizer_is_refused(tmp_path, older, name):
  run, first = tmp_path / 'run', word_tokenizer(tmp_path / 't.json')
  describe(run, tokenizer=first)
  if older:
    change(run, tokenizer_digest='gone')
  describe(run, tokenizer=load_saved(tmp_path / 't.json'))
  if older:
    change(run, tokenizer_digest='gone')
  others = {'byte': ByteTokenizer(), 'bpe': BPE, 'swapped': word_tokenizer(tmp_path / 't.json', the=3, fox=2)}
  refused(run, r'began with another tokenizer \(wordlevel-4\)', tokenizer=others[name])


def test_a_tokenizer_that_is_spelled_otherwise_is_the_same(run):
  """As by another version of the library; the run's own file says which it was."""
  respell(run)
  describe(run)
  assert data_of(run)['tokenizer_digest'] == BPE.digest == prepare._own_digest(run)


def respell(run, bos=''):
  """Another spelling of the run's tokenizer.json, as an older version of the library has it."""
  spelled = json.dumps(json.loads((run / 'tokenizer.json').read_text()), indent=7)
  (run / 'tokenizer.json').write_text(spelled)
  folder_tokens.seal(run)
  change(run, tokenizer_digest=hashlib.sha256((spelled + bos).encode()).hexdigest())


def test_a_tokenizer_whose_folder_names_bos_may_be_spelled_otherwise_too(tmp_path):
  run, folder = tmp_path / 'run', tmp_path / 'folder'
  folder.mkdir()
  (folder / 'tokenizer_config.json').write_text('{"bos_token": "the"}')
  word_tokenizer(folder / 'tokenizer.json')
  tokenizer = load_saved(folder / 'tokenizer.json')
  describe(run, tokenizer=tokenizer)
  respell(run, '2')
  describe(run, tokenizer=tokenizer)
  assert data_of(run)['tokenizer_digest'] == tokenizer.digest
  respell(run, '3')  # documents began with another token
  with pytest.raises(UserError, match='began with another tokenizer'):
    describe(run, tokenizer=tokenizer)


@pytest.mark.parametrize('at', ['save', 'seal'])
def test_a_start_that_is_killed_on_its_way_to_another_spelling(run, at, monkeypatch):
  respell(run)
  owner = {'save': type(BPE), 'seal': folder_tokens}[at]
  with monkeypatch.context() as patch:
    patch.setattr(owner, at, lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      describe(run)
  describe(run)
  assert data_of(run)['tokenizer_digest'] == BPE.digest == prepare._own_digest(run)
  assert load_saved(run / 'tokenizer.json').digest == BPE.digest


def test_a_tokenizer_json_that_was_changed_is_not_believed(run):
  (run / 'tokenizer.json').write_text(ByteTokenizer().to_json())
  refused(run, 'began with another tokenizer', tokenizer=ByteTokenizer())
  describe(run)
  assert prepare._own_digest(run) == BPE.digest


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('', 'data.json is no valid JSON'),
    ('{"corpus": "te', 'data.json is no valid JSON'),
    ('[' * 100_000, 'data.json is no valid JSON: it is nested too deeply'),
    ('[]', 'data.json holds no JSON object'),
    ('{}', 'digest is None, not of type str; restore it, or delete it'),
    ('{"digest": 7}', 'digest is 7, not of type str'),
    ('{"digest": "x", "train_bytes": "many"}', "train_bytes is 'many', not of type int"),
    ('{"digest": "x", "corpus": {}}', 'corpus is {}, not of type str'),
    ('{"digest": "x"}', r'began with other text \(unnamed\)'),
  ],
)
def test_a_damaged_data_json_is_one_line(run, content, message):
  (run / 'data.json').write_text(content)
  refused(run, message)


@pytest.mark.parametrize('value', ['gone', None, 'x', True, -1.0, float('nan'), []])
def test_what_is_missing_or_wrong_and_can_be_made_is_made_again(run, value):
  before = data_of(run)
  change(run, gzip_bits_per_byte=value, val_tokens=value)
  describe(run)
  assert data_of(run) == before


def test_a_missing_data_json_of_a_run_with_rows_is_remarked(run):
  (run / 'data.json').unlink()
  (run / 'metrics.jsonl').write_text('{"step": 1}\n')
  assert 'data.json was missing' in describe(run)[-1]
  assert len(describe(run)) == 1


def test_records_without_text_are_counted(tmp_path):
  lines = describe(tmp_path / 'run', Corpus(CORPUS.train, CORPUS.val, 'text', num_nulls=1234))
  assert lines[-1] == '1,234 records were left out: their text is null'
  assert data_of(tmp_path / 'run')['null_records'] == 1234


def test_a_tokenizer_that_loses_text_is_remarked(tmp_path):
  lines = describe(tmp_path / 'run', tokenizer=word_tokenizer(tmp_path / 't.json'))
  assert 'tokenizer wordlevel-4 loses text: 100% of a sample' in lines[-1]
  assert data_of(tmp_path / 'run')['tokenizer_loses'] == 1


def lost(tokenizer, *texts):
  return prepare.lost_share(tokenizer, [Document(str(i), text.encode()) for i, text in enumerate(texts)])


def test_lost_share_is_that_of_the_text(tmp_path):
  words = word_tokenizer(tmp_path / 't.json')
  kept, gone = 'the fox the fox ' * 500, 'The Fox, the fox ' * 500
  assert lost(words, 'the fox') == lost(words, kept) == 0
  assert lost(words, 'the cat') == lost(words, gone) == 1
  assert lost(words, kept, gone[:4000]) == pytest.approx(4000 / (len(kept) + 4000), abs=2 / prepare.SAMPLES)


@pytest.mark.parametrize('text', ['a', 'é', '日本😀' * 999, ' leading\n\n  lines ' * 200, '\r\n' * 999])
def test_bytes_and_byte_level_bpe_lose_nothing(text):
  for tokenizer in (ByteTokenizer(), BPE):
    assert lost(tokenizer, text, text * 2) == 0
