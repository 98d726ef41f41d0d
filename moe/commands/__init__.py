"""The commands: a module each, with its flags and its `main(argv)`, for `moe NAME` and experiments/NAME.py."""

import ast
import importlib
import os
import sys
from pathlib import Path

from absl import flags

from moe import cli
from moe.config import nearest

NAMES = (
  'train', 'evaluate', 'generate', 'ablate', 'report', 'compare', 'thin', 'convert', 'bench', 'plan', 'python_corpus',
)  # fmt: skip

flags.disclaim_key_flags()  # flags are the commands'


def main() -> None:
  """`moe NAME ...`: one command; without a name, what there is."""
  name, *rest = sys.argv[1:] or ['']
  if name in NAMES:
    sys.argv = [f'moe {name}', *rest]
    start(name)
  elif name in ('', '-h', '--help', 'help'):
    sys.argv = sys.argv[:1]
    cli.run(_usage)
  else:
    cli.fail(f'there is no command {name!r}; the nearest is {nearest(name, NAMES)!r} (moe --help lists them)')


def start(name: str) -> None:
  """Runs the command of NAMES with this process's arguments, and exits."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's notices are for its developers
  module = importlib.import_module(f'moe.commands.{name}')
  sys.modules['__main__'].__doc__ = module.__doc__  # what --help shows, with the flags adopted here
  flags.adopt_module_key_flags(module)
  flags.declare_key_flag('plugins')
  cli.run(module.main)


def _usage(_):
  print('usage: moe COMMAND ...; moe COMMAND --help tells its flags\n')
  for known in NAMES:
    print(f'  {known:14} {_first_line(known)}')


def _first_line(name):
  """Of a command's docstring, read without the seconds that importing it takes."""
  docstring = ast.get_docstring(ast.parse((Path(__file__).parent / f'{name}.py').read_text()))
  return (docstring or '').split('\n')[0]
