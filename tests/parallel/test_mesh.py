"""The mesh a config asks for, and the one-line refusals of those that cannot be."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from moe.config import Config, MeshConfig, ModelConfig, TrainConfig
from moe.errors import UserError
from moe.parallel import mesh


def config_of(model=None, train=None, dispatch='auto', **axes):
  """16 experts, 4 heads, d_ff 384, d_expert 128, vocabulary 257 -> 384, 16 sequences, unless replaced."""
  return Config(
    model=dataclasses.replace(ModelConfig(), **(model or {})),
    train=dataclasses.replace(TrainConfig(), **(train or {})),
    mesh=MeshConfig(**axes),
    dispatch=dispatch,
  )


@pytest.mark.parametrize(
  ('axes', 'shape'),
  [
    ({}, (1, 1, 1, 1)),
    ({'preset': 'h20x16'}, (2, 1, 8, 1)),
    ({'preset': 'h20x16_ep'}, (1, 1, 16, 1)),
    ({'preset': 'h20x16_serve'}, (2, 1, 1, 8)),
    ({'preset': 'h20x16', 'pipe': 1, 'data': 2}, (1, 2, 8, 1)),
    ({'data': 3, 'tensor': 5}, (1, 3, 1, 5)),
  ],
)
def test_presets_and_overrides(axes, shape):
  assert mesh.mesh_shape(MeshConfig(**axes)) == shape


@pytest.mark.parametrize('preset', ['h20x16', 'h20x16_ep', 'h20x16_serve'])
def test_presets_of_the_cluster_use_its_16_gpus(preset):
  assert np.prod(mesh.mesh_shape(MeshConfig(preset=preset))) == 16


def test_a_model_that_no_memory_holds_is_refused():
  made = mesh.make_mesh(config_of())
  mesh.check_memory(config_of(), made)
  large = config_of(model={'d_model': 2**16, 'd_expert': 2**16})
  parameters = 4 * 17 * 3 * 2**32  # matrices of the experts of 3 layers and an MTP module
  with pytest.raises(
    UserError, match=r'([\d.e+]+) parameters needs ([\d,]+) GB .* the 1 device.* hold [\d,]+ GB'
  ) as caught:
    mesh.check_memory(large, made)
  size, needed_gb = re.search(r'of (\S+) parameters needs (\S+) GB', str(caught.value)).groups()
  assert float(size) == pytest.approx(parameters, rel=0.05)
  assert float(needed_gb.replace(',', '')) == pytest.approx(12 * float(size) / 1e9, rel=0.01)


def test_unknown_preset_is_refused_with_the_valid_ones():
  with pytest.raises(UserError, match="'h100' must be one of local, h20x16, h20x16_ep, h20x16_serve"):
    mesh.mesh_shape(MeshConfig(preset='h100'))


def test_expert_shards_are_neighbours():
  """16 devices are two nodes of 8: experts exchange inside a node, tensor shards between direct neighbours."""
  ids = lambda made: np.vectorize(lambda device: device.id)(made.devices)
  made = mesh.make_mesh(config_of(data=2, expert=8))
  assert dict(made.shape) == {'pipe': 1, 'data': 2, 'expert': 8, 'tensor': 1}
  np.testing.assert_array_equal(ids(made)[0, :, :, 0], [range(8), range(8, 16)])
  np.testing.assert_array_equal(ids(mesh.make_mesh(config_of(data=2, expert=2, tensor=2)))[0, 1, 1], [6, 7])


def test_a_mesh_may_leave_devices_unused():
  assert mesh.make_mesh(config_of(expert=2, data=2)).size == 4 < len(jax.devices())


def test_abstract_mesh_has_the_same_axes_without_devices():
  abstract, made = mesh.abstract_mesh((1, 32, 64, 1)), mesh.make_mesh(config_of())
  assert abstract.size == 2048
  assert abstract.axis_names == made.axis_names
  assert abstract.axis_types == made.axis_types


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'pipe': 4}, ['mesh.pipe = 4', 'MoE layers', '3']),
    ({'data': 32, 'train': {'batch_size': 32}}, ['32 devices', 'there are 16', 'mesh.cpu_devices=32']),
    ({'expert': 3}, ['model.num_experts = 16', 'expert axis', '3']),
    ({'tensor': 8}, ['model.num_heads = 4', 'tensor axis', '8']),
    ({'tensor': 4, 'model': {'d_ff': 386}}, ['model.d_ff = 386', 'tensor axis', '4']),
    ({'tensor': 4, 'model': {'d_expert': 126}}, ['model.d_expert = 126', 'tensor axis', '4']),
    ({'tensor': 5, 'model': {'num_heads': 5, 'd_ff': 5, 'd_expert': 5}}, ['vocabulary = 384', 'tensor axis', '5']),
    ({'data': 3}, ['train.batch_size = 16', '3 x 1 x 1 = 3']),
    ({'data': 2, 'expert': 4, 'train': {'microbatches': 4}}, ['train.batch_size = 16', '2 x 4 x 4 = 32']),
    ({'expert': 2, 'dispatch': 'local'}, ["dispatch = 'local'", 'one expert shard', 'all_to_all']),
  ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(changes, words):
  with pytest.raises(UserError) as error:
    mesh.make_mesh(config_of(**changes))
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message


def test_the_same_settings_one_step_inside_the_limits_are_accepted():
  mesh.make_mesh(config_of(expert=4, tensor=4))
  mesh.make_mesh(config_of(data=2, expert=4, train={'microbatches': 2}))
  mesh.make_mesh(config_of(tensor=3, model={'num_heads': 3, 'd_ff': 3, 'd_expert': 3}))
  mesh.make_mesh(config_of(expert=2, dispatch='all_to_all'))
  mesh.make_mesh(config_of(data=2, dispatch='local'))
