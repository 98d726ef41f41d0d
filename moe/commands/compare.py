"""How far the training losses of two runs over the same data are apart; prints JSON and draws both.

moe compare runs/bf16 runs/fp8 --plot=fp8_loss.png
"""

import json

from absl import flags

from moe.errors import UserError
from moe.files.paths import local_path
from moe.report import compare
from moe.report.run import load_run

LAST = flags.DEFINE_integer('last', 100, 'Steps that count, from the end.')
PLOT = flags.DEFINE_string('plot', '', 'A PNG of both curves.')


def main(argv):
  if len(argv) != 3:
    raise UserError(f'{len(argv) - 1} run directories given; usage: moe compare RUN OTHER_RUN')
  base, other = (load_run(local_path(arg, 'run directory')) for arg in argv[1:])
  print(json.dumps(compare.compare(base, other, LAST.value), indent=2))
  if PLOT.value:
    compare.plot(base, other, (base.name, other.name), local_path(PLOT.value, '--plot'))
