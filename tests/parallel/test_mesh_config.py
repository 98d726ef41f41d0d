"""Sizes of a mesh from a config: presets, what is inferred, what does not fit."""

import dataclasses
import re

import pytest

from moe.config import Config, MeshConfig, from_config_dict, to_config_dict
from moe.errors import UserError
from moe.parallel import mesh as meshes


@pytest.mark.parametrize(
  ('mesh', 'expected'),
  [
    (MeshConfig(), (1, 1, 1, 1)),
    (MeshConfig(data=2, tensor=4), (1, 2, 1, 4)),
    (MeshConfig(preset='h20x16'), (2, 1, 8, 1)),
    (MeshConfig(preset='h20x16_ep'), (1, 1, 16, 1)),
    (MeshConfig(preset='h20x16_serve'), (2, 1, 1, 8)),
    (MeshConfig(preset='h20x16', pipe=1, data=2), (1, 2, 8, 1)),
  ],
)
def test_mesh_shape(mesh, expected):
  assert meshes.mesh_shape(mesh) == expected


def test_unknown_preset():
  with pytest.raises(UserError, match=r"mesh.preset = 'h100' must be one of local, h20x16, h20x16_ep, h20x16_serve"):
    meshes.mesh_shape(MeshConfig(preset='h100'))


@pytest.mark.parametrize(
  ('overrides', 'shape', 'fragment'),
  [
    ({}, (4, 1, 1, 1), 'mesh.pipe = 4 must be at most the MoE layers of the model, 3'),
    ({'train.schedule': 'dualpipe'}, (2, 1, 1, 1), "'dualpipe' on 2 ranks would hold all layers on each"),
    ({'train.schedule': 'dualpipe'}, (3, 1, 1, 1), 'must be even, not 3; use dualpipe_v'),
    (
      {'train.schedule': 'dualpipe', 'train.microbatches': 5, 'train.batch_size': 20, 'model.num_layers': 9},
      (4, 1, 1, 1),
      'their number must be even: 5',
    ),
    (
      {'train.microbatches': 1},
      (2, 1, 1, 1),
      'train.microbatches = 1 is too few for a pipeline of 2 ranks: at least 2',
    ),
    ({'train.batch_size': 8}, (2, 1, 8, 1), 'such as 1 x 8 x 2 = 16'),
    (
      {'train.schedule': 'dualpipe_v'},
      (3, 1, 1, 1),
      '6 stages of a pipeline need at least 4 MoE layers, and the model has 3',
    ),
    (
      {'balance.aux_loss': 'switch', 'balance.aux_scope': 'global_batch'},
      (2, 1, 1, 1),
      "balance.aux_scope = 'global_batch' asks for the loads of earlier microbatches",
    ),
    ({}, (1, 1, 3, 1), 'model.num_experts = 16 must be divisible by the expert axis of the mesh, 3'),
    ({}, (1, 1, 1, 3), 'model.num_heads = 4 must be divisible by the tensor axis of the mesh, 3'),
    ({'model.num_heads': 8, 'model.d_ff': 100}, (1, 1, 1, 8), 'model.d_ff = 100 must be divisible by the tensor axis'),
    ({'model.d_expert': 6}, (1, 1, 1, 4), 'model.d_expert = 6 must be divisible by the tensor axis of the mesh, 4'),
    (
      {'model.num_heads': 9, 'model.d_expert': 9},
      (1, 1, 1, 9),
      'model.d_ff = 384 must be divisible by the tensor axis of the mesh, 9',
    ),
    (
      {'model.num_heads': 9, 'model.d_expert': 9, 'model.d_ff': 9, 'model.vocab_size': 128},
      (1, 1, 1, 9),
      'the padded vocabulary = 128 must be divisible by the tensor axis of the mesh, 9',
    ),
    ({}, (1, 3, 1, 1), 'train.batch_size = 16 must be divisible by data x expert x train.microbatches = 3 x 1 x 1 = 3'),
    ({'train.microbatches': 8}, (1, 2, 2, 1), 'data x expert x train.microbatches = 2 x 2 x 8 = 32'),
    ({'dispatch': 'local'}, (1, 1, 2, 1), "dispatch = 'local' works on one expert shard, and the mesh has 2"),
  ],
)
def test_meshes_that_do_not_fit(overrides, shape, fragment):
  config = from_config_dict(to_config_dict(Config()), overrides)
  with pytest.raises(UserError, match=re.escape(fragment)):
    meshes.validate_mesh(config, shape)


def test_meshes_that_fit():
  for shape in ((1, 1, 1, 1), (1, 4, 4, 1), (1, 1, 16, 1), (1, 2, 2, 4)):
    meshes.validate_mesh(Config(), shape)
  meshes.validate_mesh(dataclasses.replace(Config(), dispatch='local'), (1, 2, 1, 2))


def test_make_mesh():
  config = Config(mesh=MeshConfig(data=2, expert=4, tensor=2))
  assert dict(meshes.make_mesh(config).shape) == {'pipe': 1, 'data': 2, 'expert': 4, 'tensor': 2}
  with pytest.raises(UserError, match=r'data 8, expert 2, tensor 2.* needs 32 devices'):
    meshes.make_mesh(dataclasses.replace(config, mesh=MeshConfig(data=8, expert=2, tensor=2)))


@pytest.mark.parametrize(
  ('train', 'shape', 'expected'),
  [
    ({}, (1, 2, 4, 1), 1),
    ({'microbatches': 4}, (1, 1, 1, 1), 4),
    ({}, (2, 1, 1, 1), 8),
    ({}, (2, 1, 8, 1), 2),  # two sequences are left for each shard
    ({'batch_size': 60}, (4, 1, 1, 1), 15),
    ({'batch_size': 60, 'schedule': 'dualpipe'}, (4, 1, 1, 1), 12),
    ({'batch_size': 7}, (2, 1, 1, 1), 7),
  ],
)
def test_how_many_microbatches_are_chosen(train, shape, expected):
  """As many as divide a shard's sequences, up to 4 for each rank of a pipeline."""
  config = from_config_dict(to_config_dict(Config()), {f'train.{key}': value for key, value in train.items()})
  assert meshes.microbatches(config, shape) == expected
