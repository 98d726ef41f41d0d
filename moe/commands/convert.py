"""Takes trained models to Hugging Face's DeepSeek-V3 format, and released ones from there.

moe convert --run=runs/tiny --to_hf=exported --quantize=fp8
moe convert --from_hf=exported --run=runs/imported --config.mesh.cpu_devices=8 --config.mesh.expert=8

Both go on after a kill when they are started again. All is done on the CPU unless JAX_PLATFORMS names something else.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here computes much

from absl import flags

from moe import cli
from moe.errors import UserError
from moe.files.paths import local_path
from moe.interop import from_hf, to_hf

CONFIG = cli.define_config('default')  # its mesh is for --from_hf
RUN = flags.DEFINE_string('run', None, 'Run directory: the source of --to_hf, made by --from_hf.')
TO_HF = flags.DEFINE_string('to_hf', None, 'Folder to make from the newest checkpoint of --run.')
FROM_HF = flags.DEFINE_string('from_hf', None, 'Folder with a DeepSeek-V3 checkpoint to make --run from.')
DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'Of the exported weights, bfloat16 or float32.')
QUANTIZE = flags.DEFINE_string('quantize', None, 'fp8: as DeepSeek releases its models; mxfp4: the routed experts.')
MAX_SHARD_GB = flags.DEFINE_float('max_shard_gb', 5.0, 'The most an exported file holds, in 1e9 bytes.')


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; see --help')
  if not RUN.value:
    raise UserError('--run is missing; give a run directory, such as --run=runs/tiny')
  if bool(TO_HF.value) == bool(FROM_HF.value):
    raise UserError('give one of --to_hf=FOLDER and --from_hf=FOLDER')
  run, lines = local_path(RUN.value, '--run'), []
  if TO_HF.value:
    for name in flags.FLAGS:
      if name.split('.')[0] == 'config' and flags.FLAGS[name].present:
        raise UserError(f'--{name} is for --from_hf; what --to_hf writes follows from the run')
    target = local_path(TO_HF.value, '--to_hf')
    lines = to_hf.export_run(run, target, DTYPE.value, MAX_SHARD_GB.value, QUANTIZE.value)
  elif FROM_HF.value:
    lines = from_hf.import_run(local_path(FROM_HF.value, '--from_hf'), run, CONFIG())
  print(*lines, sep='\n')
