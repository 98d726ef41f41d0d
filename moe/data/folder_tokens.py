"""What a folder in Hugging Face's format says of its tokens, beside tokenizer.json. Nothing else reads these files.

A run keeps them as they were in its own folder 'hf', next to its tokenizer.json: an import copies them there, training
takes them along with the tokenizer, generation reads them, and an export writes them again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moe.errors import UserError, short
from moe.files import MAX_JSON_BYTES, digests, parse_json, read_bytes, replacing, sweep_temporaries

KEPT = 'hf'
CONFIG, GENERATION, TOKENIZER = 'config.json', 'generation_config.json', 'tokenizer_config.json'
SPECIAL, TEMPLATE, OLD_TEMPLATE = 'special_tokens_map.json', 'chat_template.jinja', 'chat_template.json'
FILES = (CONFIG, GENERATION, TOKENIZER, SPECIAL, TEMPLATE, OLD_TEMPLATE)
LENGTH = 'max_position_embeddings'
MODEL_FIELDS = (LENGTH, 'bos_token_id', 'eos_token_id', 'pad_token_id')  # of config.json, written again by an export
TokenId = Callable[[str], int | None]  # the id of a token by its text


class FolderTokens(NamedTuple):
  """The files that a folder has of FILES, as they are.

  path: where they lie. texts: by name; config.json only if it is a model's.
  """

  path: Path
  texts: dict[str, bytes]

  def fields(self, name: str) -> dict:
    """The JSON object in one of them, {} if there is none. Raises UserError if it is no JSON object."""
    return parse_json(self.texts[name], str(self.path / name)) if name in self.texts else {}

  def bos(self, token_id: TokenId, begin_ids: tuple[int, ...], known: Callable[[int], bool]):
    """(id of the token that starts a document, or None if nothing names one; remarks for the user).

    Args:
      token_id: of the tokenizer.
      begin_ids: what the tokenizer's own template puts before a text.
      known: whether the tokenizer has a token of this id.

    Raises:
      UserError: a file is no JSON object, or names no token where it should.
    """
    named: dict[str, str | int | None] = {'the template of tokenizer.json': next(iter(begin_ids), None)}
    named |= {name: self.name(name, 'bos_token') for name in (TOKENIZER, SPECIAL)}
    named |= {name: next(iter(self.ids(name, 'bos_token_id')), None) for name in (CONFIG, GENERATION)}
    found, remarks = {}, []
    for source, token in named.items():
      id = token_id(token) if isinstance(token, str) else token
      if id is not None and known(id):
        found[source] = id
      elif token is not None:
        remarks.append(f'{self.path / source} names BOS {short(token)}, which the tokenizer lacks: left out')
    if not found:
      return None, remarks
    source, bos_id = next(iter(found.items()))
    if others := ', '.join(f'{other} names {id}' for other, id in found.items() if id != bos_id):
      remarks.append(f'{self.path}: documents begin with token {bos_id}, as {source} says; {others}')
    return bos_id, remarks

  def begin_ids(self, bos_id: int, begin_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens before a prompt: those of the tokenizer's template, else BOS, unless add_bos_token says otherwise."""
    adds = self.fields(TOKENIZER).get('add_bos_token', True)
    return begin_ids or ((bos_id,) if adds is not False else ())

  def eos_ids(self, token_id: TokenId) -> tuple[int, ...]:
    """Tokens that end a sequence; () if nothing names one. Raises UserError as `bos`."""
    for name in (GENERATION, CONFIG):
      if found := self.ids(name, 'eos_token_id'):
        return found
    names = (self.name(name, 'eos_token') for name in (TOKENIZER, SPECIAL))
    return tuple(id for name in names if name is not None and (id := token_id(name)) is not None)[:1]

  def chat_template(self) -> str | None:
    """The Jinja template of a chat, or None. Raises UserError if it is not text."""
    if TEMPLATE in self.texts:
      try:
        return self.texts[TEMPLATE].decode('utf-8')
      except UnicodeDecodeError as error:
        raise UserError(f'cannot read {self.path / TEMPLATE}: {error}') from error
    found = self.fields(TOKENIZER).get('chat_template', self.fields(OLD_TEMPLATE).get('chat_template'))
    if isinstance(found, list):  # several by name
      found = {one.get('name'): one.get('template') for one in found if isinstance(one, dict)}.get('default')
    if found is not None and not isinstance(found, str):
      raise UserError(f'{self.path / TOKENIZER} has chat_template = {short(found)}; it must be text')
    return found

  def special_tokens(self) -> dict[str, str]:
    """Texts of the tokens that a chat template may ask for: bos_token, eos_token, pad_token and such."""
    keys = [(name, key) for name in (SPECIAL, TOKENIZER) for key in self.fields(name) if key.endswith('_token')]
    found = {key: self.fields(name)[key] for name, key in keys}
    texts = {key: one.get('content') if isinstance(one, dict) else one for key, one in found.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}

  def name(self, file: str, key: str) -> str | None:
    """The text of a token that a file names, as text or as an object with its content."""
    value = self.fields(file).get(key)
    text = value.get('content') if isinstance(value, dict) else value
    if not isinstance(text, str | None):
      raise UserError(f"{self.path / file} has {key} = {short(value)}; it must be a token's text")
    return text

  def ids(self, file: str, key: str) -> tuple[int, ...]:
    """The token ids that a file names by a number or a list of them."""
    value = self.fields(file).get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in listed):
      raise UserError(f'{self.path / file} has {key} = {short(value)}; it must be a token id or a list of them')
    return tuple(listed)

  def save(self, folder: Path) -> None:
    """Writes the files into a run's folder for them, or nothing if there are none. Raises UserError."""
    for name, text in self.texts.items():
      with replacing(folder / KEPT / name) as temporary:
        temporary.write_bytes(text)


NOTHING = FolderTokens(Path(), {})


def seal(run: Path) -> None:
  """Writes digests of a run's tokenizer and of what it keeps beside it. Raises OSError, UserError."""
  sweep_temporaries(run / KEPT)
  digests.write(run, ('tokenizer.json', KEPT))


def read(folder: Path) -> FolderTokens:
  """What stands in a folder, or in a run's folder for it.

  Raises:
    UserError: a file, or tokenizer.json beside them, cannot be read or was changed after its digest was written.
  """
  digests.check(folder, ('tokenizer.json', KEPT, *FILES))
  path = folder / KEPT if (folder / KEPT).is_dir() else folder
  texts = {name: read_bytes(path / name, MAX_JSON_BYTES) for name in FILES if (path / name).exists()}
  found = FolderTokens(path, texts)
  if 'model_type' not in found.fields(CONFIG):  # a run's own config.json, or that of something else
    texts.pop(CONFIG, None)
  return found
