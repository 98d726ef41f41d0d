"""Released folders that differ from DeepSeek's own: the same parameters, what they say of tokens, and damaged ones."""

import json
import os

import hf_cases
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from our_runs import read_hf
from safetensors.numpy import load_file, save_file

from moe.config import DataConfig, MeshConfig
from moe.data.tokenizer import load_saved
from moe.errors import UserError
from moe.files import read_json
from moe.inference import load as inference
from moe.interop import from_hf, hf_config, load, run_sizes, shards, to_hf
from moe.model import transformer
from moe.train import saved
from moe.train.checkpoint import flatten

PLAIN = hf_cases.fields_of('plain') | {'num_hidden_layers': 2, 'moe_intermediate_size': 8}


@pytest.fixture(scope='module')
def plain():
  return hf_cases.weights(PLAIN)


def same(folder, values, mesh):
  """Asserts that the parameters are those of PLAIN with these values, read from a folder of the usual kind."""
  hf_cases.write(folder.parent / 'usual', PLAIN, values)
  for found, expected in zip(read_hf(folder, mesh)[1:], read_hf(folder.parent / 'usual', mesh)[1:], strict=True):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_rotary_frequencies_are_no_weights(plain, tmp_path, mesh_of):
  extra = {f'model.layers.{n}.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32) for n in range(2)}
  hf_cases.write(tmp_path / 'hf', PLAIN, plain | extra)
  same(tmp_path / 'hf', plain, mesh_of())


def test_the_index_is_the_authority(plain, tmp_path, mesh_of):
  """Old copies in other files, and tensors that it does not name, count for nothing."""
  folder, half = tmp_path / 'hf', len(plain) // 2
  hf_cases.write(folder, PLAIN, {})
  (folder / shards.SINGLE).unlink()
  files = {'a.safetensors': list(plain)[:half], 'b.safetensors': list(plain)[half:]}
  for number, (file, held) in enumerate(files.items()):
    stale = {name: np.zeros_like(plain[name]) for name in list(plain)[number::3] if name not in held}
    unnamed = {'model.old.weight': np.zeros(3, np.float32)}
    save_file({name: plain[name] for name in held} | stale | unnamed, folder / file)
  index = {'weight_map': {name: file for file, held in files.items() for name in held}}
  (folder / shards.INDEX).write_text(json.dumps(index))
  same(folder, plain, mesh_of())


def fused(values):
  """The experts of each layer in one tensor, gate above up, as transformers 5 has them in memory."""
  found = {name: value for name, value in values.items() if '.experts.' not in name}
  prefix = 'model.layers.1.mlp.experts'
  one = lambda expert, kind: values[f'{prefix}.{expert}.{kind}_proj.weight']
  both = [np.concatenate([one(e, 'gate'), one(e, 'up')]) for e in range(PLAIN['n_routed_experts'])]
  down = [one(e, 'down') for e in range(PLAIN['n_routed_experts'])]
  return found | {f'{prefix}.gate_up_proj': np.stack(both), f'{prefix}.down_proj': np.stack(down)}


def test_experts_in_one_tensor(plain, tmp_path, mesh_of):
  hf_cases.write(tmp_path / 'hf', PLAIN, fused(plain))
  same(tmp_path / 'hf', plain, mesh_of())


@pytest.mark.parametrize(
  ('shape', 'says'),
  [
    ((8, 15, 16), 'has 15 rows, which are no two whole halves'),
    ((9, 16, 16), 'unknown tensor .*experts.8.gate_proj'),
    ((2**16 + 1, 2, 1), 'unknown tensor .*experts.gate_up_proj'),  # not one by one: a file may hold any number
  ],
)
def test_experts_that_cannot_be_told_apart(shape, says, plain, tmp_path):
  wrong = {'model.layers.1.mlp.experts.gate_up_proj': np.zeros(shape, np.float32)}
  hf_cases.write(tmp_path, PLAIN, fused(plain) | wrong)
  with pytest.raises(UserError, match=says):
    load.open_checkpoint(tmp_path)


def test_halves_that_share_a_scale(plain, tmp_path):
  """FP8 of experts that are no multiple of 128 wide: a block has rows of gate and of up."""
  tensors = fused(plain)
  name = 'model.layers.1.mlp.experts.gate_up_proj'
  tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
  hf_cases.write(tmp_path, PLAIN, tensors | {f'{name}_scale_inv': np.ones((8, 2, 1), np.float32)})
  with pytest.raises(UserError, match='no two whole halves'):
    load.open_checkpoint(tmp_path)


@pytest.mark.parametrize('quantized', [False, True])
def test_scales_that_are_exponents(quantized, plain, tmp_path, mesh_of):
  """F8_E8M0, in FP8 blocks and in MXFP4 groups: as the same powers of two in float32, and in U8."""
  fields = PLAIN | {'hidden_size': 32, 'q_lora_rank': 7}
  values, rng = hf_cases.weights(fields), np.random.default_rng(0)
  name, other = 'model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.experts.{}.up_proj.weight'
  del values[name]
  exponent = np.full((1, 1), 125, np.uint8)
  held = {name: rng.normal(size=(12, 32)).astype(ml_dtypes.float8_e4m3fn)}
  for expert in range(8):
    del values[other.format(expert)]
    held[other.format(expert) + '_packed'] = rng.integers(0, 256, (8, 16), np.uint8)
  codes = {other.format(expert) + '_scale': rng.integers(120, 130, (8, 1), np.uint8) for expert in range(8)}
  e8m0 = {key: code.view(ml_dtypes.float8_e8m0fnu) for key, code in (codes | {f'{name}_scale_inv': exponent}).items()}
  usual = codes | {f'{name}_scale_inv': np.full((1, 1), 2.0**-2, np.float32)}
  hf_cases.write(tmp_path / 'new', fields, values | held | e8m0)
  hf_cases.write(tmp_path / 'old', fields, values | held | usual)
  (_, new, _), (_, old, _) = (read_hf(tmp_path / one, mesh_of(), quantized=quantized) for one in ('new', 'old'))
  new, old = flatten(new), flatten(old)
  assert new.keys() == old.keys()
  for key, value in old.items():
    assert new[key].dtype == value.dtype
    np.testing.assert_array_equal(new[key], value, err_msg=key)


@pytest.mark.parametrize('model_type', ['kimi_k2', 'sarvam_mla', 'glm4_moe_lite'])
def test_the_same_mathematics_by_another_name(model_type, tmp_path):
  expected = hf_config.from_hf(PLAIN, tmp_path)
  assert hf_config.from_hf(PLAIN | {'model_type': model_type}, tmp_path) == expected


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'mlp_layer_types': ['dense', 'sparse', 'dense'], 'first_k_dense_replace': None}, 'mlp_layer_types'),
    ({'mlp_layer_types': ['sparse'], 'first_k_dense_replace': None}, 'mlp_layer_types'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    ({'model_type': 'deepseek_v2'}, 'norm_topk_prob = True'),
    ({'model_type': 'deepseek_v2', 'topk_method': 'group_limited_greedy'}, "topk_method = 'group_limited_greedy'"),
    ({'model_type': ['deepseek_v3']}, r"model_type = \['deepseek_v3'\]; only deepseek_v2, deepseek_v3, kimi_k2"),
    ({'max_position_embeddings': 'long'}, "max_position_embeddings = 'long'"),
  ],
)
def test_what_is_not(changes, says, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(PLAIN | changes))
  with pytest.raises(UserError, match=says):
    hf_config.from_hf(hf_config.read(tmp_path), tmp_path / 'config.json')


@pytest.mark.parametrize('case', ['moonlight', 'deepseek_v2'])
def test_there_and_back(case, tmp_path):
  """The model, every value, and all that the folder says of tokens, over import, run, export and import."""
  hf = hf_cases.fields_of(case) | {'max_position_embeddings': 8192, 'eos_token_id': [2, 5], 'bos_token_id': 3}
  hf |= {'pad_token_id': 4}
  hf_cases.write(tmp_path / 'hf', hf, hf_cases.weights(hf))
  words = {word: i for i, word in enumerate(['<unk>', 'a', '</s>', '[BOS]', '<pad>', '<end>'])}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '<unk>')).save(str(tmp_path / 'hf' / 'tokenizer.json'))
  small = {'generation_config.json': '{"eos_token_id": [2, 5], "top_p": 0.9}', 'chat_template.jinja': '{{ bos_token }}'}
  small['tokenizer_config.json'] = '{"bos_token": "[BOS]", "chat_template": "x"}'
  for name, text in small.items():
    (tmp_path / 'hf' / name).write_text(text)
  from_hf.import_run(tmp_path / 'hf', tmp_path / 'run')
  to_hf.export_run(tmp_path / 'run', tmp_path / 'back', 'float32')
  written = json.loads((tmp_path / 'back' / 'config.json').read_text())
  unchanged = set(hf) - {'rope_scaling', 'torch_dtype'}
  assert {name: written[name] for name in unchanged} == {name: hf[name] for name in unchanged}
  for name in (*small, 'tokenizer.json'):
    assert (tmp_path / 'back' / name).read_bytes() == (tmp_path / 'hf' / name).read_bytes()
  found = {}
  for file in (tmp_path / 'back').glob('*.safetensors'):
    found |= load_file(file)
  expected = hf_cases.weights(hf)
  assert found.keys() == expected.keys()
  assert all((found[name] == value).all() for name, value in expected.items())
  for path in ('hf', 'run', 'back'):
    tokenizer = load_saved(tmp_path / path / 'tokenizer.json')
    assert (tokenizer.bos_id, inference._eos_ids(tmp_path / path, tokenizer)) == (3, (2, 5))
  from_hf.import_run(tmp_path / 'back', tmp_path / 'again')
  models = [json.loads((tmp_path / run / 'config.json').read_text())['config']['model'] for run in ('run', 'again')]
  assert models[0] == models[1]


def test_a_run_that_trained_on(plain, tmp_path):
  """It keeps the folder's length if it began with its weights, not if it began anew, and it ends where documents do."""
  hf_cases.write(tmp_path / 'hf', PLAIN | {'max_position_embeddings': 8192, 'eos_token_id': 5}, plain)
  from_hf.import_run(tmp_path / 'hf', tmp_path / 'run')
  (tmp_path / 'run' / 'data.json').write_text('{}')
  info = read_json(tmp_path / 'run' / 'config.json')
  for source, longest in (('elsewhere', 8192), ('', DataConfig.seq_len)):
    info['config']['train']['init_from'] = source
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(info))
    to_hf.export_run(tmp_path / 'run', tmp_path / f'to_{longest}', 'float32')
    written = json.loads((tmp_path / f'to_{longest}' / 'config.json').read_text())
    assert (written['max_position_embeddings'], written['eos_token_id']) == (longest, 5)
  assert inference._eos_ids(tmp_path / 'run', inference.ByteTokenizer()) == (5, 256)


@pytest.mark.parametrize(
  ('name', 'dtype', 'value'),
  [
    ('model.norm.weight', np.float32, np.nan),
    ('model.layers.1.mlp.gate.e_score_correction_bias', np.float32, np.inf),
    ('model.layers.1.mlp.experts.3.up_proj.weight', ml_dtypes.bfloat16, -np.inf),
    ('model.layers.0.self_attn.o_proj.weight', np.float16, np.nan),
  ],
)
def test_numbers_that_are_not_finite(name, dtype, value, plain, tmp_path, mesh_of):
  wrong = plain[name].astype(dtype)
  wrong[tuple(size // 2 for size in wrong.shape)] = value
  hf_cases.write(tmp_path, PLAIN, plain | {name: wrong})
  with pytest.raises(UserError, match=rf'model\.safetensors: {name} holds a number that is not finite'):
    read_hf(tmp_path, mesh_of())


@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize(('code', 'scale'), [(0x7F, 1.0), (0xFF, 1.0), (0x08, np.nan), (0x7E, 3e38)])
def test_quantised_numbers_that_are_not_finite(code, scale, quantized, plain, tmp_path, mesh_of):
  name = 'model.layers.0.mlp.up_proj.weight'
  held = {name: np.full((12, 16), code, np.uint8).view(ml_dtypes.float8_e4m3fn)}
  hf_cases.write(tmp_path, PLAIN, plain | held | {f'{name}_scale_inv': np.full((1, 1), scale, np.float32)})
  if quantized and code == 0x7E:
    return  # the product is made on the device
  with pytest.raises(UserError, match='holds a number that is not finite'):
    read_hf(tmp_path, mesh_of(), quantized=quantized)


@pytest.mark.parametrize(
  'field',
  [
    *('num_hidden_layers', 'n_routed_experts', 'num_nextn_predict_layers', 'vocab_size', 'hidden_size'),
    *('intermediate_size', 'moe_intermediate_size', 'n_shared_experts', 'kv_lora_rank', 'q_lora_rank'),
    *('qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'num_attention_heads', 'first_k_dense_replace'),
  ],
)
@pytest.mark.parametrize('value', [10**6, 10**12, 10**30])
def test_sizes_that_the_files_do_not_hold(field, value, tmp_path, monkeypatch):
  """Refused before tables of that size are made."""
  hf = hf_cases.fields_of('q_lora_groups') | {'n_group': 1, 'topk_group': 1, 'num_nextn_predict_layers': 1}
  monkeypatch.setattr(load, 'array_shapes', None)
  more = {'num_hidden_layers': value + 1} if field == 'first_k_dense_replace' else {'num_key_value_heads': None}
  values = {name: np.zeros(shape, np.float32) for name, shape in hf_cases.shapes(hf).items()}
  hf_cases.write(tmp_path, hf | {field: value} | more, values)
  with pytest.raises(UserError, match=str(value)[:-1]) as caught:
    load.open_checkpoint(tmp_path)
  assert len(str(caught.value).replace(str(tmp_path), '')) < 300


def test_layers_that_a_run_does_not_hold(plain, tmp_path, monkeypatch):
  """A damaged config.json of a run, read by generation and by an export."""
  hf_cases.write(tmp_path / 'hf', PLAIN, plain)
  from_hf.import_run(tmp_path / 'hf', tmp_path / 'run')
  info = read_json(tmp_path / 'run' / 'config.json')
  info['config']['model'] |= {'num_layers': 1000, 'num_dense_layers': 999}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(info))
  monkeypatch.setattr(transformer, 'abstract_params', None)
  for read in (
    lambda: inference.load(tmp_path / 'run', MeshConfig()),
    lambda: to_hf.export_run(tmp_path / 'run', tmp_path / 'back'),
  ):
    with pytest.raises(UserError, match=r'model.num_dense_layers = 999, and the checkpoint of step 0 holds 1'):
      read()
  (tmp_path / 'run' / 'checkpoints' / '0' / 'params' / '_METADATA').write_text('{"tree_metadata": 3}')
  with pytest.raises(UserError, match='is damaged: its tree_metadata is 3'):
    to_hf.export_run(tmp_path / 'run', tmp_path / 'back')


def test_layers_are_read_from_a_checkpoint_that_is_held(plain, tmp_path, monkeypatch):
  """Of a run that is training, which deletes what nobody holds."""
  hf_cases.write(tmp_path / 'hf', PLAIN, plain)
  from_hf.import_run(tmp_path / 'hf', tmp_path / 'run')
  held = []

  def read(file):
    with saved.taken(file.parents[1]) as free:
      held.append(not free)
    return read_json(file)

  monkeypatch.setattr(run_sizes, 'read_json', read)
  run_sizes.check_layers(tmp_path / 'run', load.open_checkpoint(tmp_path / 'hf').model)
  assert held == [True]


def test_files_that_are_none(plain, tmp_path):
  """Pipes, which may never end; headers of an absurd length, or nested too deeply."""
  hf_cases.write(tmp_path, PLAIN, plain)
  for content in (b'\xff' * 7 + b'\x00', b'\xff' * 8, (2**40).to_bytes(8, 'little')):
    (tmp_path / shards.SINGLE).write_bytes(content + b'{}')
    with pytest.raises(UserError, match='is truncated or no safetensors file'):
      shards.open_folder(tmp_path)
  header = b'{"a":' * 100_000
  (tmp_path / shards.SINGLE).write_bytes(len(header).to_bytes(8, 'little') + header)
  with pytest.raises(UserError, match='is truncated or no safetensors file'):
    shards.open_folder(tmp_path)
  for name, says in ((shards.SINGLE, 'is not a regular file'), ('config.json', 'a pipe or device, not a file')):
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=says):
      load.open_checkpoint(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(PLAIN)) if name == shards.SINGLE else None
