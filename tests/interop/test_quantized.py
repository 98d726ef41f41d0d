"""Exports in FP8 and MXFP4: what is written, read back dequantised, and kept as it is, on meshes."""

import dataclasses
import itertools
import json

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from our_runs import make_run, random_arrays, read_hf, read_run
from safetensors import safe_open

from moe.config import Config, MeshConfig, TrainConfig
from moe.errors import UserError
from moe.interop import from_hf, shards, to_hf
from moe.ops.weights import Fp8Weight, Mxfp4Weight

# Widths that blocks of 128 divide and do not divide; each of two tensor shards has whole blocks of the feed-forwards.
WIDTHS = {'d_model': 160, 'd_ff': 256, 'd_expert': 256, 'num_heads': 2, 'qk_nope_dim': 96, 'q_lora_rank': 136}
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
PLAIN = ('embed_tokens', 'lm_head', 'norm', 'mlp.gate.', 'eh_proj', 'shared_head')  # of DeepSeek's own FP8 files


@pytest.fixture(scope='module')
def exported(tiny_model, tmp_path_factory):
  """(config, arrays, folder of each kind) of one run of random weights, some blocks of them 0 or large."""
  config = Config(model=dataclasses.replace(tiny_model, **WIDTHS))
  arrays, path = random_arrays(config), tmp_path_factory.mktemp('quantized')
  arrays['layers.experts.w_up_eDF'][0, 1] *= 1e4
  arrays['layers.experts.w_up_eDF'][1, 2, :64] = 0
  run = make_run(path / 'run', config, arrays)
  folders = {}
  for kind in ('fp8', 'mxfp4'):
    folders[kind] = path / kind
    to_hf.export_run(run, folders[kind], quantize=kind, max_shard_gb=4e6 / 1e9)
  return config, arrays, folders


def stored(folder):
  """Every tensor of the checkpoint, FP8 too, and safetensors' names of their dtypes."""
  values = {name: np.array(tensor.read()) for name, tensor in shards.open_folder(folder).items()}
  dtypes = {}
  for file in folder.glob('*.safetensors'):
    with safe_open(file, 'numpy') as opened:
      dtypes |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
  return values, dtypes


def expected_fp8(w_KN):
  """float64 values after rounding, by the oracle's loops over blocks."""
  return oracle.quantize(w_KN.astype(np.float32), 128, 128)[0]


def expected_mxfp4(w_KN):
  """float64 values after rounding each 32 inputs to the nearest of E2M1 times a power of two, ties to even codes."""
  out = np.zeros(w_KN.shape)
  for start, column in itertools.product(range(0, w_KN.shape[0], 32), range(w_KN.shape[1])):
    group = w_KN[start : start + 32, column].astype(np.float64)
    if largest := np.abs(group).max():
      scale = 2.0 ** (np.floor(np.log2(largest)) - 2)
      for row, value in enumerate(group / scale):
        distance = [abs(abs(value) - one) for one in E2M1]
        nearest = min(range(8), key=lambda code, d=distance: (d[code], code % 2))
        out[start + row, column] = np.sign(value) * E2M1[nearest] * scale
  return out


def test_fp8_files(exported):
  """As DeepSeek writes them: which tensors are FP8, a float32 factor per block, biases float32, the rest bfloat16."""
  _, arrays, folders = exported
  values, dtypes = stored(folders['fp8'])
  fields = json.loads((folders['fp8'] / 'config.json').read_text())
  assert fields['quantization_config'] == {
    'activation_scheme': 'dynamic',
    'fmt': 'e4m3',
    'quant_method': 'fp8',
    'weight_block_size': [128, 128],
  }
  index = json.loads((folders['fp8'] / shards.INDEX).read_text())
  assert index['weight_map'].keys() == values.keys()
  assert index['metadata']['total_size'] == sum(value.nbytes for value in values.values())
  for name, dtype in dtypes.items():
    if name.endswith('_scale_inv'):
      weight = values[name.removesuffix('_scale_inv')]
      assert dtype == 'F32'
      assert values[name].shape == tuple(-(-size // 128) for size in weight.shape)
    elif name.endswith('e_score_correction_bias'):
      assert dtype == 'F32'
    else:
      assert dtype == ('BF16' if any(part in name for part in PLAIN) else 'F8_E4M3'), name
      assert (f'{name}_scale_inv' in values) == (dtype == 'F8_E4M3')
  up_DF = arrays['layers.experts.w_up_eDF'][0, 1]
  name = 'model.layers.1.mlp.experts.1.up_proj.weight'
  factor = values[f'{name}_scale_inv'].repeat(128, 0)[:256].repeat(128, 1)[:, :160]
  np.testing.assert_allclose(values[name].astype(np.float64) * factor, expected_fp8(up_DF).T, rtol=1e-6)


def test_mxfp4_files(exported):
  """compressed-tensors' layout, byte by byte, of the routed experts; nothing else is quantised."""
  _, arrays, folders = exported
  values, dtypes = stored(folders['mxfp4'])
  quantization = json.loads((folders['mxfp4'] / 'config.json').read_text())['quantization_config']
  assert quantization['format'] == 'mxfp4-pack-quantized'
  for name, dtype in dtypes.items():
    if '.experts.' in name:
      assert dtype == 'U8'
      assert name.endswith(('.weight_packed', '.weight_scale'))
    else:
      assert dtype == ('F32' if name.endswith('e_score_correction_bias') else 'BF16')
  up_DF = arrays['layers.experts.w_up_eDF'][0, 1].astype(np.float64)
  name = 'model.layers.1.mlp.experts.1.up_proj.weight'
  packed_FD, scale_FD = values[f'{name}_packed'], values[f'{name}_scale']
  assert (packed_FD.shape, scale_FD.shape) == ((256, 80), (256, 5))
  expected_DF = expected_mxfp4(up_DF)
  for row, column in ((0, 0), (7, 33), (255, 79), (100, 40)):
    byte, scale = packed_FD[row, column], 2.0 ** (int(scale_FD[row, 2 * column // 32]) - 127)
    for nibble, k in ((byte & 15, 2 * column), (byte >> 4, 2 * column + 1)):
      value = E2M1[nibble & 7] * (-1 if nibble & 8 else 1) * scale
      assert value == expected_DF[k, row]


@pytest.mark.parametrize(('kind', 'expected'), [('fp8', expected_fp8), ('mxfp4', expected_mxfp4)])
@pytest.mark.parametrize('sizes', [{}, {'expert': 8}, {'tensor': 2}, {'expert': 2, 'tensor': 2, 'data': 2}])
def test_read_back(sizes, kind, expected, exported, mesh_of):
  """Dequantised on any mesh: the rounded values, for a few matrices by the oracle; and the same on each mesh."""
  _, arrays, folders = exported
  _, params, bias_LE = read_hf(folders[kind], mesh_of(**sizes))
  _, one_device, _ = read_hf(folders[kind], mesh_of())
  jax.tree.map(np.testing.assert_array_equal, params, one_device)
  np.testing.assert_array_equal(bias_LE, arrays['bias_LE'])
  up_LeDF, down_LeFD = (np.asarray(params['layers']['experts'][name]) for name in ('w_up_eDF', 'w_down_eFD'))
  for layer, expert in ((0, 1), (1, 2)):
    up_DF, down_FD = (arrays[f'layers.experts.{name}'][layer, expert] for name in ('w_up_eDF', 'w_down_eFD'))
    np.testing.assert_allclose(up_LeDF[layer, expert], expected(up_DF), rtol=1e-6)
    np.testing.assert_allclose(down_LeFD[layer, expert], expected(down_FD), rtol=1e-6)
  kept_VD = arrays['w_embedding_VD'].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(params['w_embedding_VD'], kept_VD.astype(np.float32))
  query = np.concatenate([arrays[f'layers.attention.{name}'][1] for name in ('w_query_AHN', 'w_query_rope_AHR')], -1)
  found = np.concatenate([params['layers']['attention'][name][1] for name in ('w_query_AHN', 'w_query_rope_AHR')], -1)
  if kind == 'fp8':  # blocks of the file, which cross heads and parts
    query = expected_fp8(query.reshape(136, -1)).reshape(query.shape)
    np.testing.assert_allclose(found, query, rtol=1e-6)
  else:
    np.testing.assert_array_equal(found, query.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize('sizes', [{}, {'expert': 8}, {'tensor': 2}])
def test_kept_quantised(sizes, exported, mesh_of):
  """Weights of feed-forwards and experts as the files hold them, transposed, sharded like the parameter."""
  config, _, folders = exported
  mesh = mesh_of(**sizes)
  for kind, weight, places in (('fp8', Fp8Weight, ('experts', 'shared')), ('mxfp4', Mxfp4Weight, ('experts',))):
    values, _ = stored(folders[kind])
    _, params, _ = read_hf(folders[kind], mesh, 'bfloat16', quantized=True)
    for place in places:
      found = params['layers'][place]['w_down_eFD' if place == 'experts' else 'w_down_FD']
      assert isinstance(found, weight)
      for part, suffix in zip(found, ('', '_scale_inv') if kind == 'fp8' else ('_packed', '_scale'), strict=True):
        for layer in range(config.model.num_moe_layers):
          if place == 'experts':
            theirs = [
              values[f'model.layers.{layer + 1}.mlp.experts.{expert}.down_proj.weight{suffix}'].T for expert in range(8)
            ]
          else:
            theirs = values[f'model.layers.{layer + 1}.mlp.shared_experts.down_proj.weight{suffix}'].T
          np.testing.assert_array_equal(np.asarray(part[layer]), theirs)
      local = found[0].addressable_shards[0].data
      assert local.size * mesh.shape['tensor'] * (mesh.shape['expert'] if place == 'experts' else 1) == found[0].size
    assert params['layers']['attention']['w_out_HUD'].dtype == 'bfloat16'
    assert params['layers']['w_router_DE'].dtype == 'float32'


def test_blocks_on_two_devices_are_refused(exported, mesh_of):
  _, _, folders = exported
  config = Config(model=dataclasses.replace(exported[0].model, d_expert=128, mtp_depth=0))
  run = make_run(folders['fp8'].parent / 'narrow', config, random_arrays(config))
  to_hf.export_run(run, folders['fp8'].parent / 'narrow_hf', quantize='fp8')
  with pytest.raises(UserError, match='w_down_eFD: 64 of 128 values on each device are no multiple of the 128'):
    read_hf(folders['fp8'].parent / 'narrow_hf', mesh_of(tensor=2), quantized=True)


def test_import_of_a_quantised_checkpoint(exported, tmp_path):
  """As a run that trains on: masters of the dequantised values, on the mesh of the config."""
  config, arrays, folders = exported
  mesh = MeshConfig(expert=2)
  from_hf.import_run(folders['mxfp4'], tmp_path / 'run', Config(mesh=mesh, train=TrainConfig(batch_size=8)))
  found, _ = read_run(tmp_path / 'run', config)
  expected_DF = expected_mxfp4(arrays['layers.experts.w_gate_eDF'][1, 5])
  np.testing.assert_allclose(found['layers.experts.w_gate_eDF'][1, 5], expected_DF, rtol=1e-6)
  up_DF = arrays['dense_layers.0.ffn.w_up_DF'].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(found['dense_layers.0.ffn.w_up_DF'], up_DF.astype(np.float32))


def test_what_cannot_be_quantised(tiny_model, tmp_path):
  config = Config(model=tiny_model)  # width 16
  run = make_run(tmp_path / 'run', config, random_arrays(config))
  with pytest.raises(UserError, match=r'up_proj.weight of shape \[6, 16\] cannot be MXFP4|gate_proj.weight of shape'):
    to_hf.export_run(run, tmp_path / 'hf', quantize='mxfp4')
  with pytest.raises(UserError, match="quantize 'int4' must be one of None, fp8, mxfp4"):
    to_hf.export_run(run, tmp_path / 'hf', quantize='int4')
  assert [path.name for path in tmp_path.iterdir()] == ['run']
