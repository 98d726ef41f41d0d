"""Text as tokens come: whole characters, and nothing of a stop string."""

import pytest

from moe.data.tokenizer import ByteTokenizer
from moe.errors import UserError
from moe.inference.text import TextStream


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
