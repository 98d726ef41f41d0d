"""The one exception for mistakes a user can mend; `moe.cli` prints it as a single line and exits with 2."""


class UserError(Exception):
  """Bad input. The message says what is wrong, the value, and what would be valid, in one line."""


def short(value: object, most: int = 80) -> str:
  """`repr` of a value that a file holds, cut so that a line that shows it stays readable."""
  text = repr(value)
  return text if len(text) <= most else f'{text[: most - 4]} ...'
