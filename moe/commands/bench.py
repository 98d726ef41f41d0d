"""Measures the pieces that decide the speed of a MoE model, after checking them.

moe bench --suite=gemm
moe bench --suite=fp8
moe bench --suite=layer --profile
moe bench --suite=scaling --json=scaling.json
moe bench --suite=step
moe bench --suite=generate
moe bench --suite=mesh
moe bench --suite=mesh --cpu_devices=2 --only=expert,pipe
moe bench --suite=speculate --checkpoint=runs/mtp

gemm: the grouped matmul's backends beside one dense matmul and, on a GPU with torch, torch's grouped_mm.
fp8: the forward product in FP8 with block scales and, on a GPU with torch, torch's with a scale per row.
layer: a MoE layer, router to combine, beside Hugging Face's DeepseekV3MoE where torch and transformers are.
scaling: the same over the number of experts and of tokens, with a plot beside the JSON file.
step: a train step of configs/h200.py's model, beside Hugging Face's DeepseekV3ForCausalLM.
generate: greedy generation by that model (configs/tiny.py's on a CPU), beside transformers' generate.
mesh: a train step on each kind of mesh that the devices make, beside one device.
speculate: generation by a trained model of yours, plain and with drafts of its MTP module.

Sizes are for 2 CPU cores or one Hopper GPU, whichever is there. A contender that fails is a row that says so, and the
exit status is 1.
"""

import dataclasses
import json
import os
import sys

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leaves memory to the peers

import jax
import jax.numpy as jnp
from absl import flags

from moe import cli
from moe.bench import fp8 as fp8_suite
from moe.bench import gemm as gemm_suite
from moe.bench import generate as generate_suite
from moe.bench import layer as layer_suite
from moe.bench import mesh as mesh_suite
from moe.bench import peers, rows, timing
from moe.bench import scaling as scaling_suite
from moe.bench import speculate as speculate_suite
from moe.bench import step as step_suite
from moe.config import Config, MeshConfig, from_config_dict
from moe.errors import UserError
from moe.files.paths import COMMAND, local_path, output_file
from moe.inference.load import load
from moe.parallel.mesh import make_mesh, platform_of, setup_devices

SUITES = ('gemm', 'fp8', 'layer', 'scaling', 'step', 'mesh', 'generate', 'speculate')
SUITE = flags.DEFINE_enum('suite', 'gemm', SUITES, 'What to measure.')
REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed repetitions; the median counts.', lower_bound=1)
JSON = flags.DEFINE_string('json', '', 'Also write the results to this file.')
PROFILE = flags.DEFINE_bool('profile', False, 'layer, scaling, step: print the kernels that take longest.')
CPU_DEVICES = flags.DEFINE_integer(
  'cpu_devices', 0, 'generate, mesh: split the CPU into so many virtual devices, which share a batch.', 0, 4096
)
ONLY = flags.DEFINE_string('only', '', 'mesh: parts of names, comma-separated: those alone, beside one device.')
LAYERS = flags.DEFINE_integer('layers', 4, 'mesh: layers of the model, the first one dense.', 4, 64)
CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'speculate: run directory or Hugging Face folder of the model.')
CONTENDER = flags.DEFINE_enum(
  'contender', '', ('', *step_suite.CONTENDERS), 'step: measure this one here, and print its row as JSON.'
)


def gemm(hopper: bool) -> list[dict]:
  shapes: tuple[gemm_suite.Shape, ...]
  backends: tuple[str, ...]
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
  shapes = layer_suite.GPU_SHAPES if hopper else layer_suite.CPU_SHAPES
  settings = _compute_dense_repeats_inner(hopper)
  return [row for shape in shapes for row in layer_suite.measure(shape, *settings, PROFILE.value)]


def scaling(hopper: bool) -> list[dict]:
  sweeps = scaling_suite.GPU_SWEEPS if hopper else scaling_suite.CPU_SWEEPS
  shape, experts, tokens = sweeps
  found = scaling_suite.measure(shape, experts, tokens, *_compute_dense_repeats_inner(hopper), PROFILE.value)
  if JSON.value:
    picture = local_path(JSON.value, '--json').with_suffix('.png')
    scaling_suite.plot(found, picture)
    print(f'picture: {picture}')
  return found


def step(hopper: bool) -> list[dict]:
  config = step_suite.sized(from_config_dict(cli.read_config('h200')), 'hopper' if hopper else 'cpu')
  if CONTENDER.value:
    return [step_suite.contender(CONTENDER.value, config, REPEATS.value, PROFILE.value)]
  names = [name for name in step_suite.CONTENDERS if name != peers.NAME or not peers.missing()]
  options = [f'--repeats={REPEATS.value}', f'--profile={PROFILE.value}']
  command = lambda name: [*COMMAND, 'bench', '--suite=step', f'--contender={name}', *options]
  return step_suite.collect(config, names, command, _compute_dense_repeats_inner(hopper)[1])


def mesh(hopper: bool) -> list[dict]:
  if len(jax.devices()) < 2:
    raise UserError(f'suite mesh needs 2 devices or more, not {len(jax.devices())}; on a CPU give --cpu_devices=2')
  config = step_suite.sized(from_config_dict(cli.read_config('h200')), 'hopper' if hopper else 'cpu')
  model = dataclasses.replace(config.model, num_layers=LAYERS.value)
  return mesh_suite.measure(dataclasses.replace(config, model=model), REPEATS.value, ONLY.value)


def generate(hopper: bool) -> list[dict]:
  config = from_config_dict(cli.read_config('h200' if hopper else 'tiny', 'model.mtp_depth=0'))
  return generate_suite.measure(config, REPEATS.value, CPU_DEVICES.value or 1)


def speculate(hopper: bool) -> list[dict]:
  del hopper
  if not CHECKPOINT.value:
    raise UserError('suite speculate needs a model: --checkpoint=RUN, trained with --config.model.mtp_depth=1')
  return speculate_suite.measure(load(local_path(CHECKPOINT.value, '--checkpoint'), MeshConfig()), REPEATS.value)


def _compute_dense_repeats_inner(hopper: bool) -> tuple[str, float, int, int]:
  compute, size, inner = ('bfloat16', 8192, 5) if hopper else ('float32', 1024, 1)
  return compute, timing.dense_tflop_per_s(size, compute, REPEATS.value, inner), REPEATS.value, inner


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; see --help')
  if JSON.value:
    output_file(JSON.value, '--json', ('.json',))  # before minutes of measuring; the picture is beside it
  if SUITE.value == 'mesh':  # no peers beside it, and programs of many sizes one after the other: none finds holes
    os.environ |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'true', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'}
  suites = dict(zip(SUITES, (gemm, fp8, layer, scaling, step, mesh, generate, speculate), strict=True))
  setup_devices(MeshConfig(cpu_devices=CPU_DEVICES.value))
  results = suites[SUITE.value](platform_of(make_mesh(Config())) == 'hopper')
  if CONTENDER.value:
    print(json.dumps(results[0]))
    return
  machine = f'jax {jax.__version__}{peers.versions()}, {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores'
  notes = [peers.missing()] if SUITE.value in ('layer', 'step', 'generate') else []
  rows.show(SUITE.value, machine, results, notes, JSON.value)
  if any('failed' in row for row in results):
    sys.exit(1)
