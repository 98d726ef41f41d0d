"""How far the training losses of two runs over the same data are apart; prints JSON and draws both.

python experiments/compare.py runs/bf16 runs/fp8 --plot=fp8_loss.png
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from absl import flags

from moe import cli
from moe.errors import UserError
from moe.files.paths import local_path
from moe.report import compare
from moe.report.run import load_run

LAST = flags.DEFINE_integer('last', 100, 'Steps that count, from the end.')
PLOT = flags.DEFINE_string('plot', '', 'A PNG of both curves.')


def main(argv):
  if len(argv) != 3:
    raise UserError(f'{len(argv) - 1} run directories given; usage: python experiments/compare.py RUN OTHER_RUN')
  base, other = (load_run(local_path(arg, 'run directory')) for arg in argv[1:])
  print(json.dumps(compare.compare(base, other, LAST.value), indent=2))
  if PLOT.value:
    compare.plot(base, other, (base.name, other.name), local_path(PLOT.value, '--plot'))


if __name__ == '__main__':
  cli.run(main)
