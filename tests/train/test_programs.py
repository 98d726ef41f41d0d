"""What holds in all programs of training, evaluation and generation, seen as they are traced.

No array without elements enters a shard_map: jax 0.11 compiles such a program for two devices into a segfault. And
names of arrays say how many axes they have (`suffixes.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suffixes
from jax.sharding import PartitionSpec as P
from test_step_mesh import CONFIG, MODEL, SMALL, change

from moe.balance import rules
from moe.config import PrecisionConfig
from moe.inference import forward, generate, weights
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings, Slots
from moe.model import transformer
from moe.parallel.cut import equations
from moe.parallel.mesh import abstract_mesh
from moe.train import state, step

MESH = abstract_mesh((1, 2, 2, 2))
BFLOAT16 = PrecisionConfig(compute='bfloat16')
FP8 = dataclasses.replace(BFLOAT16, fp8='experts,ffn,attention,dispatch')


def empty_inputs(function, *args):
  """Inputs without elements of the shard_maps in a program, closed-over constants among them; there must be one."""
  with suffixes.watched() as mismatches:
    program = jax.make_jaxpr(function)(*args)
  assert not mismatches
  found = [e for e in equations(program.jaxpr) if e.primitive.name == 'shard_map']
  assert found
  return [value.aval for equation in found for value in equation.invars if not value.aval.size]


def test_finds_empty_constants_and_operands():
  shard = lambda function: jax.jit(jax.shard_map(function, mesh=MESH, in_specs=P('data'), out_specs=P('data')))
  x_TD, empty_TD, empty_D = jnp.ones((2, 3)), jnp.ones((2, 0)), jnp.ones(0)
  assert not empty_inputs(shard(lambda x: x.at[:, 1:].add(1)), x_TD)
  assert empty_inputs(shard(lambda x: x.at[:, :].add(1)), x_TD)  # its indices: what broke attention's gradient
  assert empty_inputs(shard(lambda x: jax.lax.scan(lambda y, _: (y + empty_D.sum(), 0), x, length=2)[0]), x_TD)
  assert empty_inputs(shard(lambda x: x), empty_TD)


def test_finds_names_that_do_not_fit():
  fits = {
    'x_TD': (2, 3),
    'size_e': (4,),
    'w_eDF': (1, 2, 3),
    'row_M1': (5, 1),
    'x_X': (1, 2, 3, 4),
    'biased_TGe': (1, 2, 3),
  }
  fits |= {'T': (3, 3), 'step_s': (2, 2), 'top_k': (1, 1)}  # no suffixes
  assert not [name for name, shape in fits.items() if suffixes.mismatch(name, np.zeros(shape))]
  for name, shape in {'x_TD': (2,), 'size_e': (), 'w_DCR': (2, 3), 'load_E': (2, 3)}.items():
    assert suffixes.mismatch(name, np.zeros(shape)) == f'{name} has {len(shape)} axes'
  with suffixes.watched() as mismatches:
    rules.mean(jnp.zeros(3))
  assert mismatches == {'balance/rules/__init__.py:mean: load_LE has 1 axes'}


@pytest.mark.parametrize(
  ('model', 'precision', 'dispatch'),
  [
    (MODEL, BFLOAT16, 'ragged'),
    (MODEL, FP8, 'all_gather'),
    (SMALL, {}, 'all_to_all'),  # no dense layers, shared experts or MTP modules
  ],
  ids=['bfloat16', 'fp8', 'small'],
)
def test_training_and_evaluation(model, precision, dispatch):
  config = change(CONFIG, model=model, precision=precision, dispatch=dispatch, grouped_matmul='ragged_dot')
  old = state.abstract(config)
  rows = jax.ShapeDtypeStruct((1, 16, config.data.seq_len + 1), jnp.int32)
  batch = {'token_BS': rows, 'segment_BS': rows}
  assert not empty_inputs(step.make_train_step(step.resolve(config, MESH, 'cpu'), MESH), old, batch)
  assert not empty_inputs(
    step.make_eval_step(step.resolve(config, MESH, 'cpu'), MESH), old.params, old.balance['bias_LE'], batch
  )


@pytest.mark.parametrize(('scheme', 'drafts', 'precision'), [('none', 0, {}), ('fp8', 1, BFLOAT16)])
def test_generation_without_end_tokens(scheme, drafts, precision):
  """Weights made ready, a chunk of prompts, and decoding steps or speculative ones."""
  config = change(CONFIG, precision=precision, dispatch='all_gather', grouped_matmul='blocked')
  config = step.resolve(config, MESH, 'cpu')
  params, bias_LE = transformer.abstract_params(config), state.abstract(config).balance['bias_LE']
  prepare = lambda params, bias_LE: weights.prepare(params, bias_LE, config, MESH, scheme)
  assert not empty_inputs(prepare, params, bias_LE)
  ready = jax.eval_shape(prepare, params, bias_LE)
  made = generate.Generator(ready, Settings(config, Sampling(0.8), (), 32, drafts), MESH, slots=4, prompt_chunk=4)
  one = lambda dtype, *rest: jax.ShapeDtypeStruct((made.slots, *rest), dtype)
  int_B, hidden_BKD = one(jnp.int32), one(jnp.dtype(config.precision.compute), drafts + 1, config.model.d_model)
  cache = forward.cache_shapes(config, made.slots, 32, mtp=drafts > 0)
  slots = Slots(int_B, int_B, one(bool), int_B, one(jnp.uint32), hidden_BKD, one(jnp.int32, drafts + 1), int_B, cache)
  assert not empty_inputs(made._decode, ready, slots)
  assert not empty_inputs(made._prefill, ready, slots, one(jnp.int32, 5), int_B, one(bool))
