"""Text as tokens come: whole characters, and nothing of a stop string."""

import pytest
import tokenizers

from moe.data.text import TextStream, pieces
from moe.data.tokenizer import ByteTokenizer, JsonTokenizer
from moe.errors import UserError


def parts(text: str, stops=(), size=1):
  stream, data = TextStream(ByteTokenizer(), stops), text.encode()
  said = [stream.add(list(data[i : i + size])) for i in range(0, len(data), size)]
  if not stream.stopped:
    said.append(stream.add([], last=True))
  assert ''.join(said) == stream.text
  return said, stream


def test_characters_come_whole():
  said, stream = parts('aä€b')
  assert said == ['a', '', 'ä', '', '', '€', 'b', '']
  assert not stream.stopped


def json_tokenizer(decoder) -> JsonTokenizer:
  """Tokens of a space and a word, of a word, and of single bytes."""
  words = ['\u2581one', '\u2581two', 'three', *(f'<0x{byte:02X}>' for byte in range(256)), '<s>']
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
  tokenizer.add_special_tokens(['<s>'])
  tokenizer.decoder = decoder
  return JsonTokenizer(tokenizer.to_str())


@pytest.mark.parametrize('size', [1, 2, 3, 7, 100])
def test_any_pieces_give_the_text_of_all_tokens(size):
  """Of a decoder that drops the first space and fuses bytes, what a token says depends on those before it."""
  decoders = tokenizers.decoders
  tokenizer = json_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]))
  of_bytes = lambda text: [3 + byte for byte in text.encode()]
  tokens = [0, 1, 2, *of_bytes(' ä€😀'), 1, 0, *of_bytes('é'), 0, 259, 2, 3 + 0xC3, 2, 1]
  stream = TextStream(tokenizer, before=())
  said = [stream.add(tokens[i : i + size], last=i + size >= len(tokens)) for i in range(0, len(tokens), size)]
  assert ''.join(said) == stream.text == tokenizer.decode(tokens)
  assert stream.text == 'one twothree ä€😀 two oneé one' + 'three\N{REPLACEMENT CHARACTER}three two'


SPACED = {
  'metaspace': ('\u2581', tokenizers.decoders.Metaspace()),
  'llama': ('\u2581', tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace('\u2581', ' '), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    tokenizers.decoders.Strip(' ', 1, 0),
  ])),
  'words': ('', None),
}  # fmt: skip


@pytest.mark.parametrize('kind', SPACED)
def test_text_goes_on_where_the_prompt_ended(kind):
  """The first space of a new word stays, though decoded alone it would go; at the beginning of a text there is none."""
  mark, decoder = SPACED[kind]
  words = ['<s>', *(f'{mark}{word}' for word in ('the', 'quick', 'fox'))]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, '<s>'))
  if decoder:
    tokenizer.decoder = decoder
  tokenizer = JsonTokenizer(tokenizer.to_str())
  for before, expected in (([0, 1], ' quick fox'), ([0], 'quick fox'), ((), 'quick fox')):
    stream = TextStream(tokenizer, before=before)
    assert stream.add([2]) + stream.add([3]) + stream.add([], last=True) == stream.text == expected
  stream = TextStream(tokenizer, [' quick'], [0, 1])
  assert stream.add([2]) == ''
  assert stream.stopped


def test_what_a_stream_continues_need_not_be_known():
  decoders = tokenizers.decoders
  vocabulary = {word: i for i, word in enumerate(['<s>', '\u2581a', '\u2581the', '\u2581quick', 'a'])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, '<s>'))
  tokenizer.decoder = decoders.Metaspace()
  stream = TextStream(JsonTokenizer(tokenizer.to_str()), [' quick'])
  assert stream.add([2]) == ' the'
  assert stream.add([3]) == ''
  assert stream.stopped


def test_old_tokens_are_not_decoded_again():
  seen = []

  class Counting(ByteTokenizer):
    def decode(self, ids):
      seen.append(len(ids))
      return super().decode(ids)

  stream = TextStream(Counting())
  for byte in b'a' * 100:
    stream.add([byte])
  assert max(seen) == 2


@pytest.mark.parametrize('size', [1, 2, 3, 100])
def test_stops_before_the_stop_string(size):
  said, stream = parts('one\n\ntwo', ['\n\n'], size)
  assert ''.join(said) == 'one'
  assert stream.stopped


def test_the_first_of_several_stop_strings_counts():
  assert parts('abcdef', ['ef', 'cd'])[1].text == 'ab'


def test_what_may_become_a_stop_string_waits():
  said, stream = parts('a<b<<c', ['<<<'])
  assert said == ['a', '', '<b', '', '', '<<c', '']
  assert stream.text == 'a<b<<c'


def test_broken_characters_come_at_the_end():
  stream = TextStream(ByteTokenizer())
  assert stream.add([0xC3]) == ''
  assert stream.add([], last=True) == '\N{REPLACEMENT CHARACTER}'


def test_an_empty_stop_string_is_refused():
  with pytest.raises(UserError, match='stop string is empty'):
    TextStream(ByteTokenizer(), [''])


@pytest.mark.parametrize('text', ['aä€b', '', 'one\n\ttwo  😀'])
def test_each_token_has_its_piece(text):
  ids = [256, *text.encode()]
  found = pieces(ByteTokenizer(), ids)
  assert len(found) == len(ids)
  assert ''.join(found) == text
  assert [piece for piece in found if piece] == list(text)


def test_a_piece_of_a_broken_character_is_shown():
  assert pieces(ByteTokenizer(), [ord('a'), 0xC3]) == ['a', '\N{REPLACEMENT CHARACTER}']
