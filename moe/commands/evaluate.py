"""How good a trained model is, on the validation text of its run or on other text; prints JSON.

moe evaluate --checkpoint=runs/tiny
moe evaluate --checkpoint=runs/tiny --quantize=mxfp4 --paths=my_text/

The text of a run must be what it trained on: with a file more, text is split otherwise, and what is validation text now
was training text then. --paths evaluates on any. --quantize rounds the weights first, as that of `moe generate` does.
"""

import dataclasses
import json
import time

from absl import flags

from moe.data.batches import pack
from moe.data.corpus import load_corpus
from moe.data.prepare import check_text
from moe.errors import UserError
from moe.inference import flags as model_flags
from moe.inference import quantize
from moe.train import evaluate
from moe.train.experts import Watch
from moe.train.state import Weights
from moe.train.step import make_eval_step

flags.adopt_module_key_flags(model_flags)
PATHS = flags.DEFINE_string(
  'paths', None, 'Text, as config data.paths: its validation split; that of the run if not given.'
)
SEQUENCES = flags.DEFINE_integer('sequences', 0, 'So many, spread over the text; 0: all.', lower_bound=0)
BATCH = flags.DEFINE_integer('batch', 16, 'Sequences at a time.', 1, 2**20)
QUANTIZE = flags.DEFINE_enum('quantize', 'none', quantize.SCHEMES, 'Round weights to FP8, or experts to MXFP4.')


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; see --help')
  model = model_flags.load_model()
  data = model.config.data if PATHS.value is None else dataclasses.replace(model.config.data, paths=PATHS.value)
  corpus = load_corpus(data)
  if PATHS.value is None:
    check_text(model_flags.checkpoint(), corpus)
  rows = pack(corpus.val, model.tokenizer, data.seq_len, 'the validation text')
  shards = model_flags.DATA.value * model_flags.EXPERT.value
  size = -(-BATCH.value // shards) * shards
  config = dataclasses.replace(model.config, train=dataclasses.replace(model.config.train, batch_size=size))
  params = quantize.rounded(model.params, QUANTIZE.value)
  state, step = Weights(params, {'bias_LE': model.bias_LE}), make_eval_step(config, model.mesh)
  evaluate.evaluate(step, state, rows, config, model.mesh, 1)  # compiles
  start = time.perf_counter()
  watch = Watch(rows, model.config.model, model.tokenizer)
  found = evaluate.evaluate(step, state, rows, config, model.mesh, SEQUENCES.value, watch)
  found['tokens_per_s'] = round(found['val_tokens'] / (time.perf_counter() - start))
  del found['load_LE']
  of = {'checkpoint': model_flags.CHECKPOINT.value, 'step': model.step, 'quantize': QUANTIZE.value}
  print(json.dumps(of | found, indent=2))
