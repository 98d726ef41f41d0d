"""The flags of scripts that read a trained model: which one, and how it lies on the devices.

A script shows them in its --help after `flags.adopt_module_key_flags(model_flags)`.
"""

import sys
from pathlib import Path

from absl import flags

from moe.config import MeshConfig
from moe.data.cached import use_compilation_cache
from moe.errors import UserError
from moe.files.paths import local_path
from moe.inference import load

CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Run directory, or folder of a Hugging Face checkpoint.')
TOKENIZER = flags.DEFINE_string('tokenizer', '', 'byte, or a tokenizer.json; that of the checkpoint if not given.')
DTYPE = flags.DEFINE_string('dtype', '', 'To compute in, float32 or bfloat16; as in training if not given.')
DATA = flags.DEFINE_integer('data', 1, 'Devices, or groups of them, that share the sequences.', lower_bound=1)
EXPERT = flags.DEFINE_integer('expert', 1, 'Devices that share the experts.', lower_bound=1)
TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that share heads, hidden width and vocabulary.', lower_bound=1)
CPU_DEVICES = flags.DEFINE_integer('cpu_devices', 0, 'Split the CPU into so many virtual devices.', 0, 4096)


def checkpoint() -> Path:
  """The folder that --checkpoint names."""
  if not CHECKPOINT.value:
    raise UserError('--checkpoint is missing; give a run directory, such as --checkpoint=runs/tiny')
  return local_path(CHECKPOINT.value, '--checkpoint')


def load_model(quantized: bool = False) -> load.Model:
  """The model that the flags name; see `load.load`. What it remarks goes to stderr."""
  path = checkpoint()
  mesh = MeshConfig(data=DATA.value, expert=EXPERT.value, tensor=TENSOR.value, cpu_devices=CPU_DEVICES.value)
  if TOKENIZER.value:
    local_path(TOKENIZER.value, '--tokenizer')
  model = load.load(path, mesh, DTYPE.value, quantized, TOKENIZER.value)
  for remark in model.remarks:
    print(remark, file=sys.stderr)
  use_compilation_cache(model.config.data)
  return model
