"""Conversations by a folder's template, read as transformers reads it, and what is refused."""

import json
import sys

import pytest
import tokenizers

from moe.data.tokenizer import ByteTokenizer, load_saved
from moe.errors import UserError
from moe.inference import chat

TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}
{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
WORDS = ['<s>', '<|user|>', '<|assistant|>', '<|end|>', *'abc<|>user\n']
ASK = [{'role': 'user', 'content': ' ab '}]


@pytest.fixture
def folder(tmp_path):
  """Characters, and special tokens of which the template is made."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(WORDS)}, []))
  tokenizer.add_special_tokens(WORDS[:4])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  return tmp_path


def template_in(folder, name, text):
  """`text` as the template, in each of the ways that folders have one, and <s> as BOS."""
  settings = {'bos_token': {'content': '<s>', 'lstrip': False}, 'chat_template': 'not this one'}
  if name == 'chat_template.jinja':
    (folder / name).write_text(text)
  elif name == 'chat_template.json':
    del settings['chat_template']
    (folder / name).write_text(json.dumps({'chat_template': text}))
  else:
    listed = [{'name': 'tool_use', 'template': ''}, {'name': 'default', 'template': text}]
    settings['chat_template'] = text if name == 'text' else listed
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return load_saved(folder / 'tokenizer.json')


@pytest.mark.parametrize('name', ['chat_template.jinja', 'chat_template.json', 'text', 'list'])
def test_tokens_of_a_conversation(name, folder):
  """Special tokens of the template are tokens; as plain text, they are characters."""
  tokenizer = template_in(folder, name, TEMPLATE)
  assert chat.encode(ASK, tokenizer) == [
    WORDS.index(one) for one in ('<s>', '<|user|>', 'a', 'b', '<|end|>', '<|assistant|>')
  ]
  assert tokenizer.encode(b'<|user|>').tolist() == [WORDS.index(one) for one in '<|user|>']


def test_what_templates_may_use():
  """As transformers gives it to them: tojson without HTML's escapes, the clock, and the tag around what was said."""
  text = '{{ value | tojson }} {{ value | tojson(indent=1) }} {% generation %}x{% endgeneration %} {{ nothing }}'
  assert chat.render(text, value={'a': '<é>'}) == '{"a": "<é>"} {\n "a": "<é>"\n} x '
  assert chat.render('{{ strftime_now("%Y") | length }}') == '4'


@pytest.mark.parametrize(
  ('text', 'says'),
  [
    ("{{ raise_exception('alternate!') }}", 'TemplateError: alternate!'),
    ('{% if %}', 'TemplateSyntaxError'),
    ('{{ 1 / 0 }}', 'ZeroDivisionError'),
    ('{{ messages.append(1) }}', 'SecurityError'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
  ],
)
def test_templates_that_fail(text, says, folder):
  with pytest.raises(UserError, match=f'the chat template cannot be applied: .*{says}') as caught:
    chat.encode(ASK, template_in(folder, 'text', text))
  assert '\n' not in str(caught.value)


def test_no_template_and_no_jinja(folder, monkeypatch):
  for tokenizer in (ByteTokenizer(), load_saved(folder / 'tokenizer.json')):
    with pytest.raises(UserError, match='there is no chat template'):
      chat.encode(ASK, tokenizer)
  with pytest.raises(UserError, match='chat_template = 5; it must be text'):
    chat.encode(ASK, template_in(folder, 'text', 5))
  tokenizer = template_in(folder, 'text', TEMPLATE)
  monkeypatch.setitem(sys.modules, 'jinja2', None)
  with pytest.raises(UserError, match='needs jinja2; run: pip install'):
    chat.encode(ASK, tokenizer)
