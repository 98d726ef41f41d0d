"""A conversation as the tokens that a chat model was trained on: by the template of its folder, written in Jinja.

Templates are programs of strangers: they run in Jinja's sandbox, and what goes wrong in one is one line. Whatever
spells a special token in the text that comes out is that token, also where the user wrote it, as with transformers.
"""

import datetime
import json

from moe.data.tokenizer import Tokenizer
from moe.errors import UserError


def encode(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
  """Token ids of a conversation up to where the model answers.

  Args:
    messages: each with a 'role', such as 'user', and its 'content'.

  Raises:
    UserError: the tokenizer's folder has no template, Jinja is not installed, or the template fails.
  """
  folder = tokenizer.folder
  template = folder.chat_template()
  if template is None:
    raise UserError(
      'there is no chat template: neither chat_template.jinja nor a chat_template in tokenizer_config.json beside the '
      "model's tokenizer.json; leave --chat away, and the prompt is text to continue"
    )
  context = {'messages': messages, 'add_generation_prompt': True, 'tools': None, 'documents': None}
  text = render(template, **folder.special_tokens() | context)
  return tokenizer.encode_special(text)


def render(template: str, **context) -> str:
  """The text that a template makes, as transformers does. Raises UserError: no Jinja, or what goes wrong in it."""
  try:
    import jinja2
    from jinja2 import ext, nodes, sandbox
  except ImportError as error:
    raise UserError('a chat template needs jinja2; run: pip install "moe-lossfree[chat]"') from error

  class Generation(ext.Extension):
    """The tag that marks what an assistant said, for training on it: here its contents alone."""

    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
      return nodes.Scope(body).set_lineno(line)

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = lambda value, **how: json.dumps(value, **{'ensure_ascii': False} | how)
  environment.globals |= {
    'raise_exception': refuse,
    'strftime_now': lambda form: datetime.datetime.now().strftime(form),
  }
  try:
    return environment.from_string(template).render(**context)
  except Exception as error:  # a template may do anything that Python can
    why = ' '.join(str(error).split())[:160]
    raise UserError(f'the chat template cannot be applied: {type(error).__name__}: {why}') from error
