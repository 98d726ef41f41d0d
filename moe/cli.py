"""What every script under experiments/ shares: run an absl main, and print a user's mistake as one line."""

import logging as std_logging
import sys
import warnings

from absl import app, flags, logging

from moe.errors import UserError


def run(main) -> None:
  """Parses flags, runs `main(argv)` and exits.

  A `UserError`, or a flag that absl or ml_collections refuses, is printed as `error: ...` with exit status 2; any
  other exception is a bug and keeps its traceback.
  """

  def guarded(argv):
    _quieten_orbax()
    try:
      return main(argv)
    except UserError as error:
      fail(error)
    except KeyboardInterrupt:
      sys.exit(130)  # as a shell says of a command that Ctrl-C ended

  app.run(guarded, flags_parser=_parse_flags)


def fail(error) -> None:
  """Prints `error` as one line on stderr and exits with status 2."""
  print('error: ' + ' '.join(str(error).split()), file=sys.stderr, flush=True)
  sys.exit(2)


def _quieten_orbax():
  """No narration of every file opened, nor of a failed write: its error reaches the caller, who says it in one line.

  Before that, each array that was still being written adds a traceback, from whichever thread it was in: Orbax's log,
  asyncio's log, and tensorstore, whose callbacks find the event loop gone and end in `sys.unraisablehook`.
  """
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname or record.exc_info is None)
  std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  show = sys.unraisablehook
  sys.unraisablehook = lambda found: None if str(found.exc_value) == 'Event loop is closed' else show(found)


def _parse_flags(argv):
  try:
    return app.parse_flags_with_usage(argv) if _wants_help(argv) else flags.FLAGS(argv)
  except UserError as error:
    fail(error)
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    # ml_collections answers a bad override with whichever of these fits; its text names the key.
    fail(f'bad command line: {error}')


def _wants_help(argv):
  return any(arg.lstrip('-').startswith('help') for arg in argv[1:])
