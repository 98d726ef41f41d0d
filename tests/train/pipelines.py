"""The train step in a pipeline against the same step without one: loads, losses and every gradient, side by side.

    python tests/train/pipelines.py                          # all schedules on all meshes, 16 virtual devices: an hour
    python tests/train/pipelines.py --only=dualpipe_v

tests/train/test_pipelined.py has some of the cases.
"""

import argparse
import os
import pathlib
import sys
from typing import NamedTuple

sys.path.extend(map(str, pathlib.Path(__file__).resolve().parents[1:3]))  # runs from a checkout that is not installed

import jax
import numpy as np
from meshes import mesh_of
from test_step_mesh import CONFIG, Run, change, documents, gradient_of

STEPS = 20


class Case(NamedTuple):
  """schedule, mesh: of the pipeline. microbatches: of a step. layers: MoE layers. more: other changes of the config."""

  schedule: str
  mesh: dict
  microbatches: int
  layers: int = 8
  more: dict = {}

  @property
  def name(self) -> str:
    sizes = '_'.join(f'{axis}{size}' for axis, size in self.mesh.items())
    more = ''.join(f'_{key}_{value}' for section in self.more.values() for key, value in section.items())
    return f'{self.schedule}_{sizes}_{self.layers}_layers{more}'


UNROLLED = {'train': {'unroll_layers': 8}}
PLAIN = [
  Case(schedule, mesh, 2 if 'expert' in mesh and mesh['expert'] == 8 else 2 * mesh['pipe'], more=UNROLLED)
  for mesh in ({'pipe': 4}, {'pipe': 2, 'data': 2, 'expert': 2}, {'pipe': 4, 'tensor': 2}, {'pipe': 2, 'expert': 8})
  for schedule in ('gpipe', '1f1b', 'zb_h1', 'dualpipe', 'dualpipe_v')
  if (schedule, mesh['pipe']) != ('dualpipe', 2)
]
FRILLS = [
  Case('dualpipe_v', {'pipe': 2, 'data': 2, 'expert': 2}, 4, 5, {'train': {'unroll_layers': 8, 'remat': 'full'}}),
  Case('1f1b', {'pipe': 4, 'tensor': 2}, 8, 9, {'model': {'tie_embeddings': True, 'mtp_depth': 2}}),
  Case('zb_h1', {'pipe': 2, 'expert': 8}, 2, 4, {'precision': {'fp8': 'experts,dispatch'}, **UNROLLED}),
  Case('dualpipe', {'pipe': 4, 'data': 2}, 8, 4, {'model': {'capacity_factor': 1.0}, **UNROLLED}),
  Case('1f1b', {'pipe': 2, 'data': 4}, 2, 3, {'balance': {'bias_rule': 'quantile', 'aux_loss': 'switch'}}),
]


class Found(NamedTuple):
  """Of the first step: metrics, the new bias, and gradients by parameter. losses: of the steps after it."""

  first: dict
  bias_LE: np.ndarray
  gradient: dict
  losses: list


def trained(config, mesh, steps: int) -> Found:
  run = Run(config, mesh)
  first = run(documents(run.config))
  after = jax.device_get(run.state)
  gradient = {
    '/'.join(str(key.key) for key in path): leaf
    for path, leaf in jax.tree.leaves_with_path(gradient_of(after, first, run.config))
  }
  losses = [run(documents(run.config, seed))['total_loss'] for seed in range(1, steps)]
  return Found(first, after.balance['bias_LE'], gradient, losses)


def pair(case: Case, steps: int) -> tuple[Found, Found]:
  """(in a pipeline, on the same mesh without it)."""
  layers = case.layers + CONFIG.model.num_dense_layers
  base = change(CONFIG, model={'num_layers': layers}, dispatch='auto')
  for section, changes in case.more.items():
    base = change(base, **{section: changes})
  config = change(base, train={'microbatches': case.microbatches, 'schedule': case.schedule})
  rest = {axis: size for axis, size in case.mesh.items() if axis != 'pipe'}
  return trained(config, mesh_of(**case.mesh), steps), trained(config, mesh_of(**rest), steps)


def differences(found: Found, expected: Found) -> dict:
  """loss: relative, of the first step. gradient: the worst parameter's, of its norm. later: of the losses after it.

  exact: whether loads, drops and the new bias are equal to the last bit.
  """
  of_norm = lambda name: (
    np.linalg.norm(found.gradient[name] - expected.gradient[name]) / np.linalg.norm(expected.gradient[name])
  )
  keys = 'loss', 'mtp_loss', 'aux_loss', 'z_loss', 'total_loss', 'gate_entropy', 'batch_tokens'
  exact = np.array_equal(found.first['load_LE'], expected.first['load_LE'])
  exact &= found.bias_LE.tobytes() == expected.bias_LE.tobytes()
  exact &= found.first['drop_rate'] == expected.first['drop_rate']
  relative = lambda a, b: float(np.max(np.abs(np.array(a) - b) / np.maximum(np.abs(b), 1e-30), initial=0))
  return {
    'loss': max(relative(found.first[key], expected.first[key]) for key in keys if expected.first[key]),
    'gradient': float(max(of_norm(name) for name in expected.gradient)),
    'later': relative(found.losses, expected.losses),
    'exact': bool(exact),
  }


def main():
  os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 16)
  parser = argparse.ArgumentParser()
  parser.add_argument('--only', default='', help='cases with this in their name')
  only = parser.parse_args().only
  print(f'jax {jax.__version__}; the first loss, the worst gradient, {STEPS} steps; loads, drops and bias equal')
  for case in [*PLAIN, *FRILLS]:
    if only in case.name:
      one = differences(*pair(case, STEPS))
      print(f'{case.name:72} {one["loss"]:.1e} {one["gradient"]:.1e} {one["later"]:.1e} {one["exact"]}', flush=True)


if __name__ == '__main__':
  main()
