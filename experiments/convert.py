"""Takes trained models to Hugging Face's DeepSeek-V3 format, and released ones from there.

python experiments/convert.py --run=runs/tiny --to_hf=exported
python experiments/convert.py --from_hf=exported --run=runs/imported
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's notices are for its developers
os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing here computes

from absl import flags

from moe import cli
from moe.errors import UserError
from moe.interop import from_hf, to_hf

RUN = flags.DEFINE_string('run', None, 'Run directory: the source of --to_hf, made by --from_hf.')
TO_HF = flags.DEFINE_string('to_hf', None, 'Folder to make from the newest checkpoint of --run.')
FROM_HF = flags.DEFINE_string('from_hf', None, 'Folder with a DeepSeek-V3 checkpoint to make --run from.')
DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'Of the exported weights, bfloat16 or float32.')
MAX_SHARD_GB = flags.DEFINE_float('max_shard_gb', 5.0, 'The most an exported file holds, in 1e9 bytes.')


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; see --help')
  if not RUN.value:
    raise UserError('--run is missing; give a run directory, such as --run=runs/tiny')
  if bool(TO_HF.value) == bool(FROM_HF.value):
    raise UserError('give one of --to_hf=FOLDER and --from_hf=FOLDER')
  run = pathlib.Path(RUN.value).expanduser()
  if TO_HF.value:
    lines = to_hf.export_run(run, pathlib.Path(TO_HF.value).expanduser(), DTYPE.value, MAX_SHARD_GB.value)
  else:
    lines = from_hf.import_run(pathlib.Path(FROM_HF.value).expanduser(), run)
  print(*lines, sep='\n')


if __name__ == '__main__':
  cli.run(main)
