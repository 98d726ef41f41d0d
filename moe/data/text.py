"""Tokens to text as they come: whole characters only, up to a stop string."""

from collections.abc import Sequence

from moe.data.tokenizer import Tokenizer
from moe.errors import UserError

BROKEN = '\N{REPLACEMENT CHARACTER}'


class TextStream:
  """The text of one sequence that grows: `text` is all that was said.

  Characters whose bytes have not all come, and what may become a stop string, are held back.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] | None = None):
    """Nothing said yet.

    Args:
      stops: texts at which it ends, themselves not part of it.
      before: tokens that it continues, such as a prompt's, () or BOS alone at the beginning of a text; None: some word.
        A tokenizer may drop the first space of what it decodes, and only there.

    Raises:
      UserError: a stop is empty.
    """
    if '' in stops:
      raise UserError('a stop string is empty; give at least one character, or no --stop at all')
    self.tokenizer, self.stops, self.stopped, self.text = tokenizer, tuple(stops), False, ''
    # The newest tokens, whose text is decoded anew as it grows: of them the older ones' is known and only gives the
    # newer ones their context.
    self._tokens = list(tokenizer.encode(b'a') if before is None else before)
    self._older, self._known, self._held = len(self._tokens), len(tokenizer.decode(self._tokens)), ''

  def add(self, tokens: Sequence[int], last: bool = False) -> str:
    """New text that is certain after `tokens`; all there is if they are the `last`."""
    self._tokens += tokens
    decoded = self.tokenizer.decode(self._tokens)
    whole = decoded if last else decoded.rstrip(BROKEN)
    self._held += whole[self._known :]
    self._known = max(self._known, len(whole))
    if whole == decoded:
      self._forget()
    found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
    if found:
      self.stopped, end = True, min(found)
    elif last:
      end = len(self._held)
    else:
      end = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
    new, self._held = self._held[:end], self._held[end:]
    self.text += new
    return new

  def _forget(self):
    del self._tokens[: self._older]
    self._older = len(self._tokens)
    self._known = len(self.tokenizer.decode(self._tokens))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
  """The text that each of `ids`, from the beginning of a text, adds to what stands before it; together all of it.

  A token that ends within a character adds nothing, and the one that completes it adds the character. BOS adds nothing.
  """
  stream = TextStream(tokenizer, before=())
  return [stream.add([id], last=place == len(ids)) for place, id in enumerate(ids, 1)]


def _overlap(text: str, stop: str) -> int:
  """How many characters at the end of `text` are the beginning of `stop`."""
  return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
