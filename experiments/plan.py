"""`moe plan`, from a checkout that is not installed; moe/commands/plan.py says what it does."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from moe.commands import start

if __name__ == '__main__':
  start('plan')
