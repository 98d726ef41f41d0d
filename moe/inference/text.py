"""Tokens to text as they come: whole characters only, up to a stop string."""

from collections.abc import Sequence

from moe.data.tokenizer import Tokenizer
from moe.errors import UserError

BROKEN = '\N{REPLACEMENT CHARACTER}'


class TextStream:
  """The text of one sequence that grows. Characters whose bytes have not all come, and what may become a stop string,
  are held back."""

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    """stops: texts at which it ends, themselves not part of it. Raises UserError if one is empty."""
    if '' in stops:
      raise UserError('a stop string is empty; give at least one character, or no --stop at all')
    self.tokenizer, self.stops, self.stopped = tokenizer, tuple(stops), False
    self._tokens, self._said = [], 0

  def add(self, tokens: Sequence[int], last: bool = False) -> str:
    """New text that is certain after `tokens`; all there is if they are the `last`."""
    self._tokens += tokens
    text = self.tokenizer.decode(self._tokens)
    found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
    if found:
      self.stopped, end = True, min(found)
    elif last:
      end = len(text)
    else:
      end = len(text.rstrip(BROKEN))
      end -= max((_overlap(text[:end], stop) for stop in self.stops), default=0)
    new, self._said = text[self._said : max(end, self._said)], max(end, self._said)
    return new

  @property
  def text(self) -> str:
    """All that was said."""
    return self.tokenizer.decode(self._tokens)[: self._said]


def _overlap(text: str, stop: str) -> int:
  """How many characters at the end of `text` are the beginning of `stop`."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
