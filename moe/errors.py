"""The one exception for mistakes a user can mend; `moe.cli` prints it as a single line and exits with 2."""


class UserError(Exception):
  """Bad input. The message says what is wrong, the value, and what would be valid, in one line."""
