"""How good a trained model is, on the validation text of its run or on other text; prints JSON.

python experiments/evaluate.py --checkpoint=runs/tiny
python experiments/evaluate.py --checkpoint=runs/tiny --quantize=mxfp4 --paths=my_text/

--quantize rounds the weights first, as `generate.py --quantize` does.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's notices are for its developers

from absl import flags

from moe import cli, evaluate
from moe.config import MeshConfig
from moe.data.batches import pack
from moe.data.corpus import load_corpus
from moe.errors import UserError
from moe.inference import load, quantize
from moe.loop import use_compilation_cache
from moe.state import TrainState
from moe.step import make_eval_step

CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Run directory, or folder of a Hugging Face checkpoint.')
PATHS = flags.DEFINE_string(
  'paths', None, 'Text, as config data.paths: its validation split; that of the run if not given.'
)
SEQUENCES = flags.DEFINE_integer('sequences', 0, 'The first so many only; 0: all.', lower_bound=0)
BATCH = flags.DEFINE_integer('batch', 16, 'Sequences at a time.', lower_bound=1)
QUANTIZE = flags.DEFINE_enum('quantize', 'none', quantize.SCHEMES, 'Round weights to FP8, or experts to MXFP4.')
TOKENIZER = flags.DEFINE_string('tokenizer', '', 'byte, or a tokenizer.json; that of the checkpoint if not given.')
DTYPE = flags.DEFINE_string('dtype', '', 'To compute in, float32 or bfloat16; as in training if not given.')
EXPERT = flags.DEFINE_integer('expert', 1, 'Devices that share the experts.', lower_bound=1)
TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that share heads, hidden width and vocabulary.', lower_bound=1)
CPU_DEVICES = flags.DEFINE_integer('cpu_devices', 0, 'Split the CPU into so many virtual devices.', lower_bound=0)


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; see --help')
  if not CHECKPOINT.value:
    raise UserError('--checkpoint is missing; give a run directory, such as --checkpoint=runs/tiny')
  mesh = MeshConfig(expert=EXPERT.value, tensor=TENSOR.value, cpu_devices=CPU_DEVICES.value)
  model = load.load(CHECKPOINT.value, mesh, DTYPE.value, tokenizer=TOKENIZER.value)
  for remark in model.remarks:
    print(remark, file=sys.stderr)
  use_compilation_cache(model.config)
  data = model.config.data if PATHS.value is None else dataclasses.replace(model.config.data, paths=PATHS.value)
  rows = pack(load_corpus(data).val, model.tokenizer, data.seq_len, 'the validation text')
  size = -(-BATCH.value // EXPERT.value) * EXPERT.value
  config = dataclasses.replace(model.config, train=dataclasses.replace(model.config.train, batch_size=size))
  params = quantize.rounded(model.params, QUANTIZE.value)
  state, step = TrainState((), params, {'bias_LE': model.bias_LE}, ()), make_eval_step(config, model.mesh)
  evaluate.evaluate(step, state, rows, config, model.mesh, 1)  # compiles
  start = time.perf_counter()
  found = evaluate.evaluate(step, state, rows, config, model.mesh, SEQUENCES.value)
  found['tokens_per_s'] = round(found['val_tokens'] / (time.perf_counter() - start))
  del found['load_LE']
  print(json.dumps({'checkpoint': CHECKPOINT.value, 'step': model.step, 'quantize': QUANTIZE.value} | found, indent=2))


if __name__ == '__main__':
  cli.run(main)
