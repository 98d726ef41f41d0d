"""The command `moe`, as python -m moe or by the path of this file, for a package that is not installed."""

import sys
from pathlib import Path

if not __package__:
  sys.path[0] = str(Path(__file__).resolve().parents[1])

from moe.commands import main

if __name__ == '__main__':
  main()
