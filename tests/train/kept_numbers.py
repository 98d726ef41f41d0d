"""The numbers of a short run that are kept, in golden.json, so that no change moves them unnoticed.

python tests/train/kept_numbers.py    # writes golden.json anew, when a change is meant to move them
"""

import json
import pathlib
import sys
import tempfile

if __name__ == '__main__':
  sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[up]) for up in (1, 2)]
  import conftest  # noqa: F401  devices and precision as in the tests

import golden
import numpy as np
import small_runs
from safetensors.numpy import load_file

from moe.config import MeshConfig
from moe.inference.generate import continuation
from moe.inference.load import load
from moe.inference.sampling import Sampling
from moe.interop.to_hf import export_run

FILE = pathlib.Path(__file__).parent / 'golden.json'
KEYS = ('step', 'loss', 'grad_norm', 'gate_entropy', 'max_vio_batch', 'bias_min', 'bias_max', 'learning_rate', 'tokens')
EVALUATED = ('step', 'val_loss', 'val_bits_per_byte', 'max_vio_global')


def numbers(run: pathlib.Path, exported: pathlib.Path) -> dict:
  """What a finished run logged, the norms of its weights as they are exported to `exported`, and its greedy text."""
  export_run(run, exported, 'float32', 5.0, None)
  tensors = {
    name: tensor for file in sorted(exported.glob('*.safetensors')) for name, tensor in load_file(file).items()
  }
  model = load(run, MeshConfig())
  what = 'def ', 24, Sampling(), 0, lambda row, tokens: False
  return {
    'metrics': [{key: row[key] for key in KEYS} for row in golden.rows(run)],
    'evals': [{key: row[key] for key in EVALUATED} for row in golden.rows(run, 'evals')],
    'norms': {name: float(np.linalg.norm(tensor.astype(np.float64))) for name, tensor in sorted(tensors.items())},
    'text': continuation(model.params, model.bias_LE, model.tokenizer, model.config, model.mesh, *what),
  }


def main():
  from moe.train import loop

  with tempfile.TemporaryDirectory() as folder:
    corpus, run = pathlib.Path(folder) / 'corpus', pathlib.Path(folder) / 'run'
    corpus.mkdir()
    assert loop.train(small_runs.config(small_runs.write_corpus(corpus)), str(run))
    FILE.write_text(json.dumps(numbers(run, pathlib.Path(folder) / 'exported'), indent=1) + '\n')


if __name__ == '__main__':
  main()
