"""How far the training losses of two runs over the same data are apart; prints JSON and draws both.

moe compare runs/bf16 runs/fp8 --plot=fp8_loss.png
"""

import json
import sys

from absl import flags

from moe.errors import UserError
from moe.files.paths import local_path, output_file
from moe.report import compare
from moe.report.figures import SUFFIXES
from moe.report.run import load_run

LAST = flags.DEFINE_integer('last', 100, 'Steps that count, from the end.')
PLOT = flags.DEFINE_string('plot', '', 'A picture of both curves: a .png, .pdf or .svg.')


def main(argv):
  if len(argv) != 3:
    raise UserError(f'{len(argv) - 1} run directories given; usage: moe compare RUN OTHER_RUN')
  path = output_file(PLOT.value, '--plot', SUFFIXES) if PLOT.value else None
  base, other = (load_run(local_path(arg, 'run directory')) for arg in argv[1:])
  print(json.dumps(compare.compare(base, other, LAST.value), indent=2))
  if path:
    compare.plot(base, other, (base.name, other.name), path)
    print(f'picture: {path}', file=sys.stderr)  # stdout is JSON
