"""What a change that moves code must leave as it was: a short run's rows, its exported weights and its greedy text.

python tests/golden.py --out=before.json               # in one checkout, and in the other: --out=after.json
python tests/golden.py --out=before16.json --devices=16
diff before.json after.json

The files agree bit for bit, or a number has changed. Bits are those of one machine and one version of JAX; what holds
everywhere, to rounding, is tests/train/golden.json (tests/train/kept_numbers.py).
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMES = ('tokens_per_s', 'step_s', 'model_tflop_per_s', 'mfu')
MESHES = {1: {}, 16: {'data': 2, 'expert': 4, 'tensor': 2, 'cpu_devices': 16}}


def rows(workdir: pathlib.Path | str, name: str = 'metrics') -> list[dict]:
  """The rows of a file of a run, without what depends on the clock."""
  lines = (pathlib.Path(workdir) / f'{name}.jsonl').read_text().splitlines()
  return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def run(script: str, *arguments: str) -> str:
  """What a script of experiments/ prints."""
  command = [sys.executable, f'experiments/{script}.py', *arguments]
  return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True, help='JSON file to write')
  parser.add_argument('--devices', type=int, choices=MESHES, default=1, help='virtual devices')
  flags = parser.parse_args()
  mesh = [f'--config.mesh.{key}={value}' for key, value in MESHES[flags.devices].items()]
  with tempfile.TemporaryDirectory() as folder:
    workdir, exported = pathlib.Path(folder) / 'run', pathlib.Path(folder) / 'exported'
    settings = ['train.steps=30', 'train.eval_every=15', 'train.sample_tokens=20', 'data.val_fraction=0.002']
    run('train', '--config=configs/tiny.py', f'--workdir={workdir}', *(f'--config.{one}' for one in settings), *mesh)
    run('convert', f'--run={workdir}', f'--to_hf={exported}', '--dtype=float32')
    text = run('generate', f'--checkpoint={workdir}', '--prompt=def ', '--temperature=0', '--max_tokens=40')
    found = {name: rows(workdir, name) for name in ('metrics', 'evals', 'load_history')}
    found |= {'text': text, 'sample': (workdir / 'sample.txt').read_text()}
    for file in sorted(exported.glob('*.safetensors')):
      found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
  flags.out.write_text(json.dumps(found, indent=1, sort_keys=True))


if __name__ == '__main__':
  main()
