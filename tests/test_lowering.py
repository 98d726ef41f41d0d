"""The train step of the real DeepSeek-V3 traces and lowers for CUDA on meshes of GPUs that are not here."""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from test_configs import load

from moe.parallel import mesh
from moe.train import state, step


class Collective(NamedTuple):
  """kind: such as all_gather. groups: (how many, of how many devices). shape, dtype: of the data, per device."""

  kind: str
  groups: tuple[int, int]
  shape: tuple[int, ...]
  dtype: str


def lower(config, shape):
  """The train step as a module for CUDA on a mesh of this shape."""
  abstract = mesh.abstract_mesh(shape)
  mesh.validate_mesh(config, shape)
  config = step.resolve(config, abstract, 'hopper')
  micro = config.train.microbatches
  rows = jax.ShapeDtypeStruct((micro, config.train.batch_size // micro, config.data.seq_len + 1), jnp.int32)
  made = step.make_train_step(config, abstract)
  lowered = made.trace(state.abstract(config), {'token_BS': rows, 'segment_BS': rows}).lower(
    lowering_platforms=('cuda',)
  )
  return lowered.compiler_ir()


def operations(module):
  """Every operation of the main function and all within it; of a function that it calls, at each place of a call."""
  functions = {function.attributes['sym_name'].value: function for function in module.body.operations}

  def within(operation):
    yield operation
    if operation.name == 'func.call':
      yield from within(functions[operation.attributes['callee'].value].operation)
    for region in operation.regions:
      for block in region:
        for inner in block:
          yield from within(inner.operation)

  yield from within(functions['main'].operation)


def groups_of(attribute, shape):
  """(how many groups, of how many devices): listed by jax 0.10, given as the axes of the mesh from 0.11 on."""
  axes = re.findall(r'name = "(\w+)"', str(attribute))
  if not axes:
    return tuple(attribute.type.shape)
  size = math.prod(shape[mesh.AXES.index(axis)] for axis in axes)
  return math.prod(shape) // size, size


def collectives(module, shape):
  """Every collective of the module, once for each place it stands at: a loop's body counts once."""
  found = []
  for operation in operations(module):
    attributes, kind = operation.attributes, operation.name.removeprefix('stablehlo.')
    if kind == 'custom_call':  # ragged_all_to_all is one
      kind = attributes['call_target_name'].value
      attributes = attributes['backend_config'] if kind == 'ragged_all_to_all' else {}
    if 'replica_groups' in attributes:
      data = operation.operands[0].type
      found.append(
        Collective(kind, groups_of(attributes['replica_groups'], shape), tuple(data.shape), str(data.element_type))
      )
  return found


def v3(dispatch, batch_size, microbatches, **model):
  config = load('deepseek_v3')
  train = dataclasses.replace(config.train, batch_size=batch_size, microbatches=microbatches)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **model),
    train=train,
    dispatch=dispatch,
  )


def total(found, kind, groups):
  """Numbers that all such collectives take in per device."""
  return sum(math.prod(item.shape) for item in found if (item.kind, item.groups) == (kind, groups))


def test_v3_lowers_for_2048_gpus_with_its_tokens_sent_to_their_experts_only():
  """data 32 x expert 64: 4 of 256 experts per GPU, as the paper has it within a pipeline stage."""
  shape = (1, 32, 64, 1)
  module = lower(v3('ragged', 4096, 2), shape)
  assert module.operation.attributes['mhlo.num_partitions'].value == 2048
  found = collectives(module, shape)
  over_expert, over_data = (32, 64), (64, 32)
  sent = [item for item in found if item.kind == 'ragged_all_to_all']
  # There and back, forward, recomputed and backward; in the body of the scan over layers and in the MTP module.
  assert len(sent) == 2 * 3 * 2
  # 4096 tokens go to 8 experts each; at worst all GPUs of a group send 4 copies of each token to one of them.
  assert {(item.groups, item.shape, item.dtype) for item in sent} == {
    (over_expert, (rows, 7168), 'bf16') for rows in (4096 * 8, 64 * 4096 * 4)
  }
  # The experts' two products run in the Hopper kernels: forward, recomputed and two gradients each, at both places.
  kernels = collections.Counter(
    str(op.attributes['call_target_name']) for op in operations(module) if op.name == 'stablehlo.custom_call'
  )
  assert kernels['"mosaic_gpu_v2"'] == 2 * (1 + 1 + 2) * 2
  # Besides, GPUs tell one another how many rows come, and nothing more.
  rest = [item for item in found if item.groups == over_expert and item.kind != 'ragged_all_to_all']
  assert {(item.kind, item.dtype) for item in rest} == {('all_to_all', 'i32')}
  assert max(math.prod(item.shape) for item in rest) == 256
  # Weights of experts are gathered in bfloat16 and their gradients reduced in float32, each once.
  held = 59 * 4 * 3 * 7168 * 2048
  assert total(found, 'all_gather', over_data) * 32 == total(found, 'reduce_scatter', over_data) == held
  assert {item.dtype for item in found if item.kind == 'all_gather'} == {'bf16'}
  assert {item.dtype for item in found if item.kind == 'reduce_scatter'} == {'f32'}


@pytest.mark.parametrize(
  ('dispatch', 'kinds'), [('all_to_all', {'all_to_all'}), ('auto', {'all_gather', 'reduce_scatter'})]
)
def test_v3_lowers_for_16_gpus_with_the_other_dispatches(dispatch, kinds):
  """Shown too: a gather of tokens over the expert axis is seen where there is one."""
  config = v3(dispatch, 15360, 960, mtp_depth=0)
  shape = (1, 2, 8, 1)
  module = lower(config, shape)
  assert module.operation.attributes['mhlo.num_partitions'].value == 16
  found = collectives(module, shape)
  over_expert, over_data, over_both = (2, 8), (8, 2), (1, 16)
  tokens = {item.kind for item in found if item.groups == over_expert and item.shape[-1] == 7168}
  assert tokens == kinds
  assert {item.kind for item in found if item.groups == over_expert} == kinds
  # All weights but the experts' are gathered over both batch axes once, and so are gradients reduced.
  sizes = collections.Counter()
  for path, leaf in jax.tree.leaves_with_path(state.abstract(config).params):
    sizes['experts' if 'experts' in jax.tree_util.keystr(path) else 'others'] += leaf.size
  assert total(found, 'all_gather', over_both) * 16 == total(found, 'reduce_scatter', over_both) == sizes['others']
  assert total(found, 'all_gather', over_data) * 2 == total(found, 'reduce_scatter', over_data) == sizes['experts'] // 8


@pytest.mark.parametrize(
  ('dispatch', 'there', 'home', 'times_home'),
  [
    ('all_to_all', 'all_to_all', 'all_to_all', 3),
    ('ragged', 'ragged_all_to_all', 'ragged_all_to_all', 3),
    ('all_gather', 'all_gather', 'reduce_scatter', 2),  # the sum is not needed again
  ],
)
def test_v3_sends_fp8_to_the_experts_and_bfloat16_home(dispatch, there, home, times_home):
  """To the experts: tokens, recomputed tokens, gradients of combine. Home: combine, recomputed, gradients of tokens."""
  config = v3(dispatch, 15360, 960, mtp_depth=0)
  config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, fp8='dispatch'))
  shape = (1, 2, 8, 1)
  sent = [item for item in collectives(lower(config, shape), shape) if item.groups == (2, 8)]
  # Values as bytes, and a float32 scale for each 128 of them.
  rows = collections.Counter((item.kind, item.dtype, item.shape[-1]) for item in sent if item.shape[-1] in (7168, 56))
  assert rows == {(there, 'ui8', 7168): 3, (there, 'f32', 56): 3, (home, 'bf16', 7168): times_home}


# Products: gate and up, down; in FP8 also the shared expert's two and attention's six. Each has two gradients.
@pytest.mark.parametrize(
  ('remat', 'fp8', 'products', 'attention'),
  [
    ('none', '', 2 * 3, 3),
    ('dots', '', 2 * 3, 3),
    ('full', '', 2 * 4, 4),
    ('none', 'experts,ffn,attention', 10 * 3, 3),
    ('dots', 'experts,ffn,attention', 10 * 3, 3),
    ('full', 'experts,ffn,attention', 10 * 4 - 1, 4),  # the shared expert's last product is not needed again
  ],
)
def test_what_runs_again_in_the_backward_pass(remat, fp8, products, attention):
  """One layer of configs/h200.py: with 'dots', no matrix product and no attention runs again."""
  config = load('h200', f'model.num_layers=1,model.num_dense_layers=0,train.unroll_layers=1,train.remat={remat}')
  config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, fp8=fp8))
  module = lower(config, (1, 1, 1, 1))
  calls = [operation for operation in operations(module) if operation.name == 'stablehlo.custom_call']
  targets = [call.attributes['call_target_name'].value for call in calls]
  assert targets.count('mosaic_gpu_v2') == products
  triton = [str(call) for call, target in zip(calls, targets, strict=True) if target == '__gpu$xla.gpu.triton']
  assert sum(name in call for call in triton for name in ('_forward_kernel', '_dq_kernel', '_dkv_kernel')) == attention
