"""What folders say of their tokens, in every way that they say it."""

import json

import pytest
import tokenizers

from moe.data import folder_tokens
from moe.data.tokenizer import JsonTokenizer, load_saved
from moe.errors import UserError
from moe.files import read_json

WORDS = ['<unk>', '<s>', '</s>', '[BOS]', '[gMASK]', '<|endoftext|>', 'a', 'b']
BEGIN, OTHER, GUESS = 3, 4, 1  # tokens that a folder may name; what is taken where it names none


def write(folder, template=None, **files):
  """A folder with a tokenizer of WORDS, whose own template begins with these tokens, and JSON files by their stem."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(8), strict=True)), '<unk>'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  if template is not None:
    used = [(word, WORDS.index(word)) for word in template.split() if word in WORDS]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=used)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  for name, fields in files.items():
    (folder / f'{name}.json').write_text(fields if isinstance(fields, str) else json.dumps(fields))
  return folder


MODEL = {'model_type': 'deepseek_v3'}
NAMED = {'bos_token': '[BOS]'}


@pytest.mark.parametrize(
  ('files', 'bos_id', 'begin_ids'),
  [
    ({'config': MODEL | {'bos_token_id': BEGIN}}, BEGIN, (BEGIN,)),
    ({'generation_config': {'bos_token_id': BEGIN}}, BEGIN, (BEGIN,)),
    ({'tokenizer_config': NAMED}, BEGIN, (BEGIN,)),
    ({'tokenizer_config': {'bos_token': {'content': '[BOS]', 'special': True}}}, BEGIN, (BEGIN,)),
    ({'special_tokens_map': NAMED}, BEGIN, (BEGIN,)),
    ({'template': '[BOS] $A </s>'}, BEGIN, (BEGIN,)),
    ({'template': '[gMASK] [BOS] $A'}, OTHER, (OTHER, BEGIN)),
    ({'template': '$A </s>', 'tokenizer_config': NAMED}, BEGIN, (BEGIN,)),
    ({'tokenizer_config': NAMED | {'add_bos_token': True}, 'template': '$A </s>'}, BEGIN, (BEGIN,)),
    ({'tokenizer_config': NAMED | {'add_bos_token': False}}, BEGIN, ()),
    ({'tokenizer_config': NAMED | {'add_bos_token': False}, 'template': '[BOS] $A'}, BEGIN, (BEGIN,)),
    ({'tokenizer_config': NAMED, 'config': MODEL | {'bos_token_id': None}}, BEGIN, (BEGIN,)),
  ],
)
def test_bos(files, bos_id, begin_ids, tmp_path):
  tokenizer = load_saved(write(tmp_path, **files) / 'tokenizer.json')
  assert (tokenizer.bos_id, tokenizer.begin_ids) == (bos_id, begin_ids)
  assert tokenizer.remarks == []


def test_remarks_on_bos(tmp_path):
  """Where nothing names it, where sources disagree, and where the tokenizer lacks what is named."""
  guessed = load_saved(write(tmp_path / 'none') / 'tokenizer.json')
  assert guessed.bos_id == GUESS
  assert guessed.remarks == ["nothing says which token starts a document; taken: '<s>', token 1"]
  files = {'tokenizer_config': NAMED, 'template': '[gMASK] $A'}
  two = load_saved(write(tmp_path / 'two', **files, config=MODEL | {'bos_token_id': 0}) / 'tokenizer.json')
  assert two.begin_ids == (OTHER,)
  others = 'tokenizer_config.json names 3, config.json names 0'
  assert two.remarks[0].endswith(f'begin with token 4, as the template of tokenizer.json says; {others}')
  files = {'tokenizer_config': {'bos_token': '<none>'}, 'config': MODEL | {'bos_token_id': 8}}
  lacking = load_saved(write(tmp_path / 'lacking', **files) / 'tokenizer.json')
  assert lacking.bos_id == GUESS
  assert [line.split('names BOS ')[1].split(',')[0] for line in lacking.remarks[:2]] == ["'<none>'", '8']


@pytest.mark.parametrize(
  ('files', 'eos_ids'),
  [
    ({}, ()),
    ({'config': MODEL | {'eos_token_id': [2, 5]}}, (2, 5)),
    ({'config': MODEL | {'eos_token_id': 2}, 'generation_config': {'eos_token_id': [5]}}, (5,)),
    ({'config': MODEL | {'eos_token_id': None}, 'tokenizer_config': {'eos_token': {'content': '</s>'}}}, (2,)),
    ({'special_tokens_map': {'eos_token': '</s>'}, 'tokenizer_config': {'eos_token': '<none>'}}, (2,)),
    ({'config': {'eos_token_id': 2}}, ()),  # no model's: a run's own, or that of something else
  ],
)
def test_eos(files, eos_ids, tmp_path):
  tokenizer = load_saved(write(tmp_path, **files) / 'tokenizer.json')
  assert tokenizer.folder.eos_ids(tokenizer.token_id) == eos_ids


@pytest.mark.parametrize(
  ('files', 'says'),
  [
    ({'config': '{'}, 'config.json is no valid JSON'),
    ({'generation_config': '[]'}, 'generation_config.json holds no JSON object'),
    ({'tokenizer_config': '{"a":' * 100_000}, 'tokenizer_config.json is no valid JSON: it is nested too deeply'),
    ({'tokenizer_config': {'bos_token': 5}}, "has bos_token = 5; it must be a token's text"),
    ({'generation_config': {'bos_token_id': '1'}}, "has bos_token_id = '1'; it must be a token id"),
    ({'config': MODEL | {'bos_token_id': True}}, 'has bos_token_id = True; it must be a token id'),
  ],
)
def test_damaged_files(files, says, tmp_path):
  with pytest.raises(UserError, match=says) as caught:
    load_saved(write(tmp_path, **files) / 'tokenizer.json')
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) < 300


def test_a_run_keeps_what_the_folder_said(tmp_path):
  """Saved with the tokenizer, as training does it, and saved again from there: the same files."""
  files = {'config': MODEL | {'bos_token_id': BEGIN, 'eos_token_id': [2, 5]}, 'generation_config': {'top_p': 0.9}}
  folder = write(tmp_path / 'folder', **files)
  (folder / 'chat_template.jinja').write_text('{{ bos_token }}')
  first = load_saved(folder / 'tokenizer.json')
  for source, run in ((folder, tmp_path / 'run'), (tmp_path / 'run', tmp_path / 'next')):
    load_saved(source / 'tokenizer.json').save(run / 'tokenizer.json')
    (run / 'config.json').write_text('{"config": {}}')  # a run's own
    found = folder_tokens.read(run)
    assert found.path == run / 'hf'
    assert found.texts == first.folder.texts
    assert sorted(found.texts) == ['chat_template.jinja', 'config.json', 'generation_config.json']
    again = load_saved(run / 'tokenizer.json')
    assert (again.bos_id, again.digest, again.folder.chat_template()) == (BEGIN, first.digest, '{{ bos_token }}')
  left = tmp_path / 'run/hf' / f'config.json.{"0" * 32}.tmp'  # by a start that was killed
  left.touch()
  folder_tokens.seal(tmp_path / 'run')
  assert not left.exists()
  assert f'hf/{left.name}' not in read_json(tmp_path / 'run/digests.json')
  # Encoded documents begin with BOS and are kept by the digest.
  assert JsonTokenizer(first.to_json()).digest != first.digest
