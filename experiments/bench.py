"""Measures the pieces that decide the speed of a MoE model, after checking them.

python experiments/bench.py --suite=gemm
python experiments/bench.py --suite=fp8
python experiments/bench.py --suite=layer

gemm: the grouped matmul's backends beside one dense matmul and, on a GPU with torch, torch's grouped_mm.
fp8: the forward product in FP8 with block scales and, on a GPU with torch, torch's with a scale per row.
layer: a MoE layer, router to combine, over the number of experts at fixed tokens and top-k.

Sizes are for 2 CPU cores or one Hopper GPU, whichever is there.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leaves memory to the peers

import jax
import jax.numpy as jnp
from absl import flags

from moe import cli
from moe.bench import fp8 as fp8_suite
from moe.bench import gemm as gemm_suite
from moe.bench import layer as layer_suite
from moe.config import Config, ModelConfig
from moe.mesh import make_mesh, platform_of

SUITE = flags.DEFINE_enum('suite', 'gemm', ('gemm', 'fp8', 'layer'), 'What to measure.')
REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed repetitions; the median counts.', lower_bound=1)
JSON = flags.DEFINE_string('json', '', 'Also write the results to this file.')


def gemm(hopper: bool) -> list[dict]:
  if hopper:
    shapes, backends, dtype, inner = gemm_suite.GPU_SHAPES, ('mosaic_gpu',), jnp.bfloat16, 10
  else:
    shapes, backends, dtype, inner = gemm_suite.CPU_SHAPES, ('blocked', 'ragged_dot'), jnp.float32, 1
  return [row for shape in shapes for row in gemm_suite.measure(shape, backends, dtype, REPEATS.value, inner)]


def fp8(hopper: bool) -> list[dict]:
  shapes, backend, inner = (
    (gemm_suite.GPU_SHAPES, 'mosaic_gpu', 10) if hopper else (gemm_suite.CPU_SHAPES, 'blocked', 1)
  )
  return [row for shape in shapes for row in fp8_suite.measure(shape, backend, REPEATS.value, inner)]


def layer(hopper: bool) -> list[dict]:
  if hopper:
    model = ModelConfig(d_model=2048, d_expert=1024, top_k=8)
    return layer_suite.measure(model, 16384, (16, 32, 64, 128, 256), 'bfloat16', REPEATS.value, 10)
  model = ModelConfig(d_model=256, d_expert=128, top_k=4, num_shared_experts=0)
  return layer_suite.measure(model, 4096, (16, 32, 64, 128), 'float32', REPEATS.value, 1)


def main(argv):
  del argv
  results = {'gemm': gemm, 'fp8': fp8, 'layer': layer}[SUITE.value](platform_of(make_mesh(Config())) == 'hopper')
  for row in results:
    print(
      '  '.join(f'{key} {value:.4g}' if isinstance(value, float) else f'{value!s:16}' for key, value in row.items())
    )
  machine = f'jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores'
  print(machine)
  if JSON.value:
    found = {'suite': SUITE.value, 'machine': machine, 'results': results}
    pathlib.Path(JSON.value).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  cli.run(main)
