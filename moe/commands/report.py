"""Writes summary.json and report.html into run directories and prints the summaries; of a sweep, its report.

moe report RUN_DIR_OR_SWEEP [RUN_DIR_OR_SWEEP...]
"""

import json

from moe.errors import UserError
from moe.files.paths import local_path
from moe.report import packed
from moe.report.html import write_report
from moe.report.sweep import write_sweep_report
from moe.sweep import manifest


def main(argv):
  if len(argv) < 2:
    raise UserError('no run directory given; usage: moe report RUN_DIR [RUN_DIR...]')
  for path in [local_path(arg, 'run directory') for arg in argv[1:]]:
    is_sweep = any((path / name).exists() for name in (manifest.FILE, packed.FILE))
    print(write_sweep_report(path) if is_sweep else json.dumps(write_report(path), indent=2))
