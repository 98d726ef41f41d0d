"""Loading onto meshes: the same values in every layout, only what a device holds is read, and little held at a time."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from our_runs import make_run, random_arrays, read_hf

from moe.config import Config, MeshConfig, ModelConfig, TrainConfig
from moe.errors import UserError
from moe.interop import from_hf, load, shards, to_hf
from moe.interop.run_weights import RunWeights
from moe.train import state
from moe.train.checkpoint import flatten

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Widths that 8 tensor shards divide; the vocabulary is padded from 200 to 256.
WIDE = {'num_heads': 8, 'd_ff': 24, 'd_expert': 16, 'vocab_size': 200}


@pytest.fixture(scope='module')
def exported(tiny_model, tmp_path_factory):
  """(config, arrays, folder) of a checkpoint in float32, in several files."""
  path = tmp_path_factory.mktemp('load')
  config = Config(model=dataclasses.replace(tiny_model, **WIDE))
  arrays = random_arrays(config)
  to_hf.export_run(make_run(path / 'run', config, arrays), path / 'hf', 'float32', 60e3 / 1e9)
  return config, arrays, path / 'hf'


@pytest.mark.parametrize('sizes', [{}, {'expert': 8}, {'tensor': 8}, {'data': 2, 'expert': 4, 'tensor': 2}])
@pytest.mark.parametrize('stored', [False, True])
def test_values_on_meshes(sizes, stored, exported, mesh_of):
  """Every parameter as the forward pass and as a training state lays it out: values, dtype, and each device's part."""
  config, arrays, folder = exported
  mesh = mesh_of(**sizes)
  checkpoint = load.open_checkpoint(folder)
  specs = load.specs(checkpoint.model, mesh, stored)
  if stored:
    expected = state.shardings(config, mesh).params
    assert specs == jax.tree.map(lambda sharding: sharding.spec, expected)
  params, bias_LE = load.load(checkpoint, mesh, specs, 'float32')
  found = flatten(params) | {'bias_LE': bias_LE}
  assert found.keys() == arrays.keys()
  for name, value in arrays.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value, err_msg=name)
    for shard in found[name].addressable_shards:
      np.testing.assert_array_equal(shard.data, value[shard.index])
  up_LeDF = params['layers']['experts']['w_up_eDF']
  fewer = mesh.shape['expert'] * mesh.shape['tensor'] * (mesh.shape['data'] if stored else 1)
  assert up_LeDF.addressable_shards[0].data.size * fewer == up_LeDF.size


def test_bfloat16_weights(exported, mesh_of):
  """Rounded once; router, norms and bias stay float32."""
  _, arrays, folder = exported
  _, params, bias_LE = read_hf(folder, mesh_of(expert=8), 'bfloat16')
  for name, value in flatten(params).items():
    kept = 'scale' in name or 'w_router' in name
    assert value.dtype == ('float32' if kept else 'bfloat16')
    np.testing.assert_array_equal(value, arrays[name].astype(value.dtype))
  assert bias_LE.dtype == 'float32'


def test_nothing_is_read_twice(exported, mesh_of, monkeypatch):
  """Each value of the files once for 8 devices, whether they share it or not."""
  config, _, folder = exported
  checkpoint, mesh, touched = load.open_checkpoint(folder), mesh_of(expert=8), {}
  take = load.formats._take

  def counted(stored, rows, columns):
    key = (stored.file.name, stored.start)
    touched[key] = touched.get(key, 0) + len(rows) * len(columns)
    return take(stored, rows, columns)

  monkeypatch.setattr(load.formats, '_take', counted)
  load.load(checkpoint, mesh, load.specs(config.model, mesh), 'float32')
  sizes = {(one.file.name, one.start): int(np.prod(one.shape)) for one in checkpoint.stored.values()}
  copies = ('embed_tokens', 'shared_head.head')  # compared when the folder was opened
  unread = [name for name, one in checkpoint.stored.items() if (one.file.name, one.start) not in touched]
  assert all(any(part in name for part in copies) for name in unread)
  assert touched == {key: sizes[key] for key in touched}


BIG = ModelConfig(
  vocab_size=256, d_model=256, num_layers=4, num_dense_layers=1, d_ff=256, d_expert=256, num_experts=32, top_k=2,
  num_heads=2, kv_lora_rank=32, qk_nope_dim=32, qk_rope_dim=32, v_dim=32, mtp_depth=0,
)  # fmt: skip
PROGRAM = """
import sys, pathlib, jax, numpy as np
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
from moe.config import Config, MeshConfig, TrainConfig
from moe.interop import load
from moe.parallel.mesh import make_mesh

def resident(field):
  return 1024 * int(next(line for line in open('/proc/self/status') if line.startswith(field)).split()[1])

checkpoint = load.open_checkpoint(pathlib.Path(sys.argv[1]))
mesh = make_mesh(Config(model=checkpoint.model, mesh=MeshConfig(expert=8), train=TrainConfig(batch_size=8)))
specs = load.specs(checkpoint.model, mesh)
jax.block_until_ready([jax.device_put(np.zeros(5), device) for device in jax.devices()])
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
before = resident('VmRSS')
params, bias_LE = load.load(checkpoint, mesh, specs, 'float32')
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(resident('VmHWM') - before, held)
"""


def test_memory_of_a_load(tmp_path):
  """A process needs little more than the arrays: one device's part of one array, 6 MB here, and one tensor."""
  config = Config(model=BIG)
  run = make_run(tmp_path / 'run', config, random_arrays(config))
  to_hf.export_run(run, tmp_path / 'hf', 'float32', 20e6 / 1e9)
  size = sum(file.stat().st_size for file in (tmp_path / 'hf').glob('*.safetensors'))
  assert size > 75e6
  command = [sys.executable, '-c', PROGRAM, tmp_path / 'hf']
  result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
  assert result.returncode == 0, result.stderr
  peak, held = map(int, result.stdout.split())
  assert held >= size - 1e6
  assert peak < held + 20e6


def test_memory_of_an_export(tmp_path, monkeypatch):
  """At most one layer's experts are read at a time, and a file's tensors held."""
  config = Config(model=dataclasses.replace(BIG, d_model=64, d_ff=64, d_expert=64))
  run = make_run(tmp_path / 'run', config, random_arrays(config))
  most_read, most_written, most_bytes = [], [], 500e3
  read, write_file = RunWeights._read, shards.write_file

  def counted_read(self, name, index):
    value = read(self, name, index)
    most_read.append(value.nbytes)
    return value

  def counted_write(file, tensors):
    most_written.append(sum(value.nbytes for value in tensors.values()))
    write_file(file, tensors)

  monkeypatch.setattr(RunWeights, '_read', counted_read)
  monkeypatch.setattr(shards, 'write_file', counted_write)
  to_hf.export_run(run, tmp_path / 'hf', 'float32', most_bytes / 1e9)
  assert max(most_read) == 32 * 64 * 64 * 4
  assert max(most_written) <= most_bytes
  assert len(most_written) > 5
  parameters = sum(array.nbytes for array in random_arrays(config).values())
  assert sum(most_read) <= parameters  # nothing twice


def test_import_on_a_mesh_that_does_not_fit(exported, tmp_path):
  config = Config(mesh=MeshConfig(expert=3), train=TrainConfig(batch_size=3))
  with pytest.raises(UserError, match=r'model\.num_experts = 8 must be divisible by the expert axis of the mesh, 3'):
    from_hf.import_run(exported[2], tmp_path / 'run', config)
  with pytest.raises(UserError, match=r'mesh\.num_processes = 2 must be 1'):
    from_hf.import_run(exported[2], tmp_path / 'run', Config(mesh=MeshConfig(num_processes=2)))
  assert list(tmp_path.iterdir()) == []
