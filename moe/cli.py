"""What every command shares: its settings, and how it ends, without a traceback unless it is a bug.

Statuses: 0, 1 where a script says so, 2 after a mistake or where memory or disk ran out, 130 after Ctrl-C, 141 if
nobody reads what it prints any more.
"""

import errno
import logging as std_logging
import os
import re
import select
import sys
import warnings
from collections.abc import Callable

from absl import app, flags, logging

from moe import plugins
from moe.config import KINDS, Config, from_config_dict, nearest, parsed
from moe.errors import UserError, one_line, out_of_memory
from moe.files.paths import config_file, refuse_address, run_python, users_code

HELP = re.compile('--?help(short|full|xml)?')
INTERRUPTED, UNREAD = 130, 141  # as a shell reports SIGINT and SIGPIPE

flags.disclaim_key_flags()  # flags are the scripts'
PLUGINS = flags.DEFINE_multi_string(
  'plugins', [], 'A Python file that adds metrics, bias rules, dispatchers, ... (docs/howto/plugins.md); repeatable.'
)


def run(main: Callable) -> None:
  """Parses flags, runs `main(argv)` and exits.

  A `UserError`, a flag that absl refuses, and what cannot be printed or allocated are one line, `error: ...`, with
  status 2; any other exception is a bug and keeps its traceback.
  """
  sys.excepthook = sys.__excepthook__
  _quieten_orbax()
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed by whoever started this
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    getattr(sys, name).reconfigure(errors='backslashreplace')  # rather than fail where a terminal lacks a character
  try:
    try:
      app.run(lambda argv: _with_plugins(main, argv), flags_parser=_parse_flags)
    except SystemExit:
      sys.stdout.flush()
      raise
  except KeyboardInterrupt:
    sys.exit(INTERRUPTED)
  except UserError as error:
    fail(error)
  except MemoryError as error:
    fail(f'there is not enough memory: {str(error) or "Python could get no more"}')
  except OSError as error:
    unread = isinstance(error, BrokenPipeError) and _nobody_reads()
    if not unread and error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    _drop_output()
    sys.exit(UNREAD) if unread else fail(f'cannot write {error.filename or "the output"}: {error.strerror}')
  except RuntimeError as error:
    if not out_of_memory(error):
      raise
    fail(f'there is not enough memory on the device: {error}')


def fail(error) -> None:
  """Prints `error` as one line on stderr and exits with status 2."""
  print(f'error: {one_line(error)}', file=sys.stderr, flush=True)
  sys.exit(2)


def define_config(default: str) -> Callable[[], Config]:
  """Declares --config, by default the one of this name in configs/, and --config.KEY for every setting.

  Returns:
    What makes the `Config` of them, once flags are parsed. It raises UserError.
  """
  file = flags.DEFINE_string(
    'config', default, 'tiny, a path, ..., with ":key=value,..." if wanted; --config.KEY sets a key.'
  )
  given = {}
  for key, kind in KINDS.items():
    define = flags.DEFINE_boolean if kind is bool else flags.DEFINE_string
    given[key] = define(f'config.{key}', None, f'See moe/config.py ({kind.__name__}).', module_name='moe.config')

  def config() -> Config:
    refuse_address(file.value, '--config')
    path, colon, arg = file.value.partition(':')
    changes = {key: flag.value for key, flag in given.items() if flag.value is not None}
    changes = {key: parsed(key, text) if isinstance(text, str) else text for key, text in changes.items()}
    return from_config_dict(read_config(path, *([arg] if colon else [])), changes)

  return config


def read_config(name: str, *arg: str):
  """The settings, as a ConfigDict, of a config given by name or path. Raises UserError."""
  path = config_file(name, '--config')
  get_config = run_python(path, '--config').get('get_config')
  if not callable(get_config):
    raise UserError(f'--config = {str(path)!r} defines no get_config(); see configs/default.py')
  with users_code(path, '--config'):
    settings = get_config(*arg)
  if not hasattr(settings, 'keys'):
    raise UserError(f'get_config() of --config = {str(path)!r} gives {type(settings).__name__}, not settings')
  return settings


def _with_plugins(main, argv):
  plugins.load(PLUGINS.value)
  with plugins.blamed():
    return main(argv)


def _nobody_reads() -> bool:
  """Whether what stdout or stderr goes to is closed, so that it was this pipe that broke, and no other."""
  poll = select.poll()
  for stream in (sys.stdout, sys.stderr):
    poll.register(stream.fileno(), 0)
  return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output():
  """What stdout still holds goes nowhere: or Python would try, and fail, to write it as it ends."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)


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
  wanted = [arg for arg in argv[1:] if HELP.fullmatch(arg)]
  try:
    return flags.FLAGS([argv[0], wanted[0]] if wanted else argv)
  except SystemExit:  # absl has shown the help, and calls that a failure
    sys.exit(0)
  except flags.UnrecognizedFlagError as error:
    section, _, key = error.flagname.partition('.')
    if section.removeprefix('no') != 'config' or not key or 'config' not in flags.FLAGS:
      raise UserError(f'bad command line: {error}') from error
    raise UserError(
      f'unknown setting --config.{key}; the nearest valid one is --config.{nearest(key, KINDS)}'
    ) from error
  except RecursionError as error:
    raise UserError('bad command line: files of --flagfile name one another too deeply') from error
  except (flags.Error, OSError, ValueError) as error:  # the latter two: of a --flagfile
    raise UserError(f'bad command line: {error}') from error


def _show_unless_interrupted(kind, error, trace):
  """Ctrl-C while a script is still importing its modules, which takes seconds, ends it as quietly as later."""
  if issubclass(kind, KeyboardInterrupt):
    os._exit(INTERRUPTED)
  sys.__excepthook__(kind, error, trace)


sys.excepthook = _show_unless_interrupted
