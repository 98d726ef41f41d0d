"""Writes summary.json and report.html into run directories and prints the summaries.

python experiments/report.py RUN_DIR [RUN_DIR...]
"""

import json

from moe import cli
from moe.errors import UserError
from moe.report.run import write_report


def main(argv):
  if len(argv) < 2:
    raise UserError('no run directory given; usage: python experiments/report.py RUN_DIR [RUN_DIR...]')
  for path in argv[1:]:
    print(json.dumps(write_report(path), indent=2))


if __name__ == '__main__':
  cli.run(main)
