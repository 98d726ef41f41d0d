"""The train step in a pipeline computes what it computes without: every schedule, with all that a step has."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
from pipelines import UNROLLED, Case
from test_configs import load
from test_step_mesh import CONFIG, change

from moe.parallel import rings
from moe.parallel.cut import equations, programs
from moe.parallel.mesh import abstract_mesh
from moe.parallel.schedule import SCHEDULES
from moe.train import pipelined, state, step

# One with each schedule, among them: stages of unequal size, scanned layers, tied embeddings, two MTP modules.
CASES = [
  Case('gpipe', {'pipe': 2, 'tensor': 2}, 2, 2, UNROLLED),
  Case('dualpipe', {'pipe': 4}, 8, 4, UNROLLED),
  *pipelines.FRILLS[:3],
  pipelines.FRILLS[4],
]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_pipeline_trains_the_same(case):
  one = pipelines.differences(*pipelines.pair(case, 3))
  assert one['exact']
  assert one['loss'] < 1e-6
  assert one['gradient'] < 1e-5
  if 'precision' not in case.more:  # in FP8, what rounding parts goes on apart
    assert one['later'] < 1e-4


def products(jaxpr) -> float:
  """FLOPs of its matrix products; a loop of unknown length counts once."""
  total = 0.0
  for equation in jaxpr.eqns:
    shapes = [variable.aval.shape for variable in equation.invars]
    if equation.primitive.name == 'dot_general':
      contracted = math.prod(shapes[0][axis] for axis in equation.params['dimension_numbers'][0][0])
      total += 2 * contracted * equation.outvars[0].aval.size
    elif equation.primitive.name == 'ragged_dot_general':
      total += 2 * math.prod(shapes[0]) * shapes[1][-1]
    elif equation.primitive.name == 'cond':
      total += max(map(products, programs(equation)))
    else:
      times = equation.params['length'] if equation.primitive.name == 'scan' else 1
      total += times * sum(map(products, programs(equation)))
  return total


def traced(config, shape):
  mesh = abstract_mesh(shape)
  config = step.resolve(config, mesh, 'cpu')
  micro = config.train.microbatches
  rows = jax.ShapeDtypeStruct((micro, config.train.batch_size // micro, config.data.seq_len + 1), jnp.int32)
  made = step.make_train_step(config, mesh).trace(state.abstract(config), {'token_BS': rows, 'segment_BS': rows})
  return made.jaxpr.jaxpr, config


def loops(jaxpr):
  """The scans over ticks: those with a switch directly in them."""
  for equation in equations(jaxpr):
    if equation.primitive.name == 'scan':
      for inner in equation.params['jaxpr'].jaxpr.eqns:
        if inner.primitive.name == 'cond' and len(inner.params['branches']) > 2:
          yield equation.params['length'], inner.params['branches']


@pytest.mark.parametrize(('schedule', 'remat'), [(name, 'none') for name in SCHEDULES] + [('dualpipe_v', 'full')])
def test_no_product_is_computed_twice(schedule, remat):
  """FLOPs of all cells of all ranks are those of the step without a pipeline: no fifth forward."""
  config = change(
    CONFIG,
    model={'num_layers': 9, 'mtp_depth': 1},
    train={'schedule': schedule, 'microbatches': 8, 'remat': remat, 'unroll_layers': 8},
    grouped_matmul='ragged_dot',
  )
  in_pipeline, config = traced(config, (4, 1, 1, 1))
  alone, _ = traced(config, (1, 1, 1, 1))
  made, stages = pipelined.plan(config, 4)
  found = rings.plan(made, [[stages.role(stage) for stage in row] for row in stages.stage_of.tolist()])
  ((ticks, branches),) = loops(in_pipeline)
  assert (ticks, len(branches)) == (len(made.table), len(found.kinds))
  of_kind = np.array([products(branch.jaxpr) for branch in branches])
  assert of_kind[found.kind].sum() == pytest.approx(products(alone), rel=0.02)


def test_what_compiles_does_not_grow_with_microbatches():
  """V3's 61 layers on 2,048 GPUs in DualPipe: with twice the microbatches the program is as large."""
  sizes = []
  for microbatches in (60, 120):
    config = change(load('deepseek_v3'), train={'schedule': 'dualpipe', 'microbatches': microbatches})
    jaxpr, _ = traced(config, (16, 2, 64, 1))
    sizes.append(sum(1 for _ in equations(jaxpr)))
  assert sizes[1] < 1.01 * sizes[0]
