"""The one exception for mistakes a user can mend; `moe.cli` prints it as a single line and exits with 2."""

MOST_CHARACTERS = 300  # of a line of error: more does not fit a screen, and hides what matters
NO_MEMORY = 'RESOURCE_EXHAUSTED', 'Out of memory allocating'  # XLA's words: of any device, of the CPU while it computes


class UserError(Exception):
  """Bad input. The message says what is wrong, the value, and what would be valid, in one line."""


def out_of_memory(error: Exception) -> bool:
  """Whether Python or XLA could get no more memory, which says nothing about what was read or computed."""
  return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def one_line(error) -> str:
  """The text of `error` as one line of at most MOST_CHARACTERS: its beginning and its end, if it is longer."""
  line = ' '.join(str(error).split())
  if len(line) <= MOST_CHARACTERS:
    return line
  end = MOST_CHARACTERS // 3  # what would be valid stands last
  return f'{line[: MOST_CHARACTERS - end - 5]} ... {line[-end:]}'


def short(value: object, most: int = 80) -> str:
  """`repr` of a value that a file holds, cut so that a line that shows it stays readable."""
  text = repr(value)
  return text if len(text) <= most else f'{text[: most - 4]} ...'
