"""Run -> folder -> run: every value back, files of the asked-for size, tokenizers, FP8, and what cannot be exported."""

import dataclasses
import json
import math
import re
import shutil
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import tokenizers
from our_runs import make_run, random_arrays, read_hf, read_run
from safetensors.numpy import load_file, save_file

from configs import deepseek_v3
from moe.config import BalanceConfig, Config, ModelConfig, from_config_dict
from moe.data.tokenizer import load_saved
from moe.errors import UserError
from moe.files import digests
from moe.interop import from_hf, hf_config, load, names, shards, to_hf
from moe.interop.load import array_shapes
from moe.interop.run_weights import RunWeights
from moe.model import transformer
from moe.train import state
from moe.train.checkpoint import flatten, restore_weights

NO_YARN = {'yarn_factor': 1.0, 'yarn_original_len': ModelConfig.yarn_original_len}
VARIANTS = {
  'everything': {},
  'plain': {'q_lora_rank': 0, 'num_groups': 1, 'top_groups': 1, **NO_YARN, 'mtp_depth': 0},
  'no_dense': {'num_dense_layers': 0, 'yarn_mscale': 0.7, 'normalize_gates': False},
  'three_dense': {'num_layers': 5, 'num_dense_layers': 3, 'yarn_mscale': 0.0, 'mtp_depth': 0},
  'tied': {'tie_embeddings': True, 'vocab_size': 200, 'num_shared_experts': 2},
  'tied_without_mtp': {'tie_embeddings': True, 'mtp_depth': 0, 'rope_theta': 500.0, 'vocab_size': 128},
}


def equal(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_value_comes_back(variant, tiny_model, tmp_path):
  config = Config(model=dataclasses.replace(tiny_model, **VARIANTS[variant]))
  arrays = random_arrays(config)
  run = make_run(tmp_path / 'run', config, arrays)
  to_hf.export_run(run, tmp_path / 'hf', 'float32')
  from_hf.import_run(tmp_path / 'hf', tmp_path / 'again')
  imported = from_config_dict(json.loads((tmp_path / 'again' / 'config.json').read_text())['config'])
  assert imported.model == config.model
  found, step = read_run(tmp_path / 'again', imported)
  assert step == 0
  equal(found, arrays)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['again', 'hf', 'run']


def test_import_starts_another_run(tiny_model, tmp_path):
  """As train.init_from does it: the run's own moments and bias rule, the imported weights and bias."""
  config = Config(model=tiny_model, balance=BalanceConfig(bias_rule='smebu'))
  arrays = random_arrays(config)
  to_hf.export_run(make_run(tmp_path / 'run', config, arrays), tmp_path / 'hf', 'float32')
  lines = from_hf.import_run(tmp_path / 'hf', tmp_path / 'again')
  like = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3, leaf.dtype), state.abstract(config))
  like = like._replace(balance={'bias_LE': like.balance['bias_LE']})
  started, _, _ = restore_weights(tmp_path / 'again', like)
  equal(flatten(started.params) | {'bias_LE': started.balance['bias_LE']}, arrays)
  assert all((leaf == 3).all() for leaf in jax.tree.leaves(started.opt_state))
  assert f'train.init_from={tmp_path / "again"}' in lines[-1]
  settings = {}
  exec((tmp_path / 'again' / 'config.py').read_text(), settings)
  assert from_config_dict(settings['get_config']('train.seed=3')).model == tiny_model


def test_bfloat16_and_files(tiny_model, tmp_path, mesh_of):
  """Weights rounded, the bias not; no file larger than asked for; the index complete."""
  config = Config(model=tiny_model)
  arrays = random_arrays(config)
  run, most_bytes = make_run(tmp_path / 'run', config, arrays), 6000
  to_hf.export_run(run, tmp_path / 'hf', 'bfloat16', most_bytes / 1e9)
  files = sorted((tmp_path / 'hf').glob('*.safetensors'))
  assert [file.name for file in files] == [
    f'model-{n:05d}-of-{len(files):05d}.safetensors' for n in range(1, 1 + len(files))
  ]
  index = json.loads((tmp_path / 'hf' / shards.INDEX).read_text())
  found = {}
  for file in files:
    inside = load_file(file)
    assert sum(value.nbytes for value in inside.values()) <= most_bytes
    assert all(index['weight_map'][name] == file.name for name in inside)
    found |= inside
  assert found.keys() == index['weight_map'].keys()
  assert sum(value.nbytes for value in found.values()) == index['metadata']['total_size']
  biases = {name: value for name, value in found.items() if name.endswith('e_score_correction_bias')}
  assert {value.dtype for value in biases.values()} == {np.dtype(np.float32)}
  assert {found[name].dtype for name in found.keys() - biases.keys()} == {np.dtype(ml_dtypes.bfloat16)}
  np.testing.assert_array_equal(biases['model.layers.2.mlp.gate.e_score_correction_bias'], arrays['bias_LE'][1])
  up_DF = arrays['layers.experts.w_up_eDF'][1, 5].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(found['model.layers.2.mlp.experts.5.up_proj.weight'], up_DF.T)
  _, params, bias_LE = read_hf(tmp_path / 'hf', mesh_of())
  np.testing.assert_array_equal(params['layers']['experts']['w_up_eDF'][1, 5], up_DF.astype(np.float32))
  np.testing.assert_array_equal(bias_LE, arrays['bias_LE'])


def test_export_fills_files_up():
  assert shards.plan([4, 4, 4, 10, 1], 8) == [[0, 1], [2], [3], [4]]


def test_mtp_copies_and_their_absence(tiny_model, tmp_path, mesh_of):
  """DeepSeek's files repeat embedding and head; transformers saves no modules and yet their number."""
  config = Config(model=tiny_model)
  to_hf.export_run(make_run(tmp_path / 'run', config, random_arrays(config)), tmp_path / 'hf', 'float32')
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  tensors = load_file(file)
  np.testing.assert_array_equal(tensors['model.layers.4.shared_head.head.weight'], tensors['lm_head.weight'])
  np.testing.assert_array_equal(tensors['model.layers.3.embed_tokens.weight'], tensors['model.embed_tokens.weight'])
  without = {
    name: value for name, value in tensors.items() if not name.startswith(('model.layers.3', 'model.layers.4'))
  }
  rewrite(tmp_path / 'hf', without)
  model, params, bias_LE = read_hf(tmp_path / 'hf', mesh_of())
  assert model == dataclasses.replace(tiny_model, mtp_depth=0)
  assert bias_LE.shape == (2, 8)
  assert 'mtp' not in params
  assert 'the files hold none' in load.open_checkpoint(tmp_path / 'hf').remarks[0]


def rewrite(folder, tensors):
  """Leaves one file with these tensors in `folder`."""
  for file in (folder / digests.FILE, *folder.glob('*.safetensors*')):
    file.unlink()
  save_file(tensors, folder / shards.SINGLE)


def test_fp8_blocks(tiny_model, tmp_path, mesh_of):
  """Weights in FP8 with a factor per 128 x 128 block, the last blocks smaller, as DeepSeek's files have them."""
  model = dataclasses.replace(tiny_model, d_model=160, d_ff=300, vocab_size=128, mtp_depth=0)
  config = Config(model=model)
  arrays = random_arrays(config)
  to_hf.export_run(make_run(tmp_path / 'run', config, arrays), tmp_path / 'hf', 'float32')
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  tensors, name, rng = load_file(file), 'model.layers.0.mlp.up_proj.weight', np.random.default_rng(1)
  weight, scale = tensors[name].astype(ml_dtypes.float8_e4m3fn), rng.uniform(0.5, 2, (3, 2)).astype(np.float32)
  rewrite(tmp_path / 'hf', tensors | {name: weight, f'{name}_scale_inv': scale})
  fields = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  fields['quantization_config'] = {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [128, 128]}
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(fields))
  _, params, _ = read_hf(tmp_path / 'hf', mesh_of())
  expected = np.empty((300, 160), np.float32)
  for row in range(300):
    for column in range(160):
      expected[row, column] = np.float32(weight[row, column]) * scale[row // 128, column // 128]
  np.testing.assert_array_equal(params['dense_layers'][0]['ffn']['w_up_DF'], expected.T)
  np.testing.assert_array_equal(params['dense_layers'][0]['ffn']['w_gate_DF'], arrays['dense_layers.0.ffn.w_gate_DF'])


def test_table_covers_every_parameter_once(tiny_model):
  """Each number of ours lies in one tensor of the table, the vocabulary's padding in none."""
  arrays = {name: np.zeros(array.shape, int) for name, array in random_arrays(Config(model=tiny_model)).items()}
  for tensor in names.table(tiny_model):
    for view in tensor.views:
      arrays[view.name][view.place] += 1
  for name, count_VD in (('w_embedding_VD', arrays['w_embedding_VD']), ('w_head_DV', arrays['w_head_DV'].T)):
    assert (count_VD[tiny_model.vocab_size :] == 0).all()
    arrays[name] = count_VD[: tiny_model.vocab_size]
  assert [name for name, count in arrays.items() if (count != 1).any()] == []


DEEPSEEK_V3 = {  # as released
  'model_type': 'deepseek_v3',
  'aux_loss_alpha': 0.001,
  'ep_size': 1,
  'first_k_dense_replace': 3,
  'hidden_act': 'silu',
  'hidden_size': 7168,
  'initializer_range': 0.02,
  'intermediate_size': 18432,
  'kv_lora_rank': 512,
  'max_position_embeddings': 163840,
  'moe_intermediate_size': 2048,
  'moe_layer_freq': 1,
  'n_group': 8,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'norm_topk_prob': True,
  'num_attention_heads': 128,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 61,
  'num_key_value_heads': 128,
  'num_nextn_predict_layers': 1,
  'q_lora_rank': 1536,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'quantization_config': {
    'activation_scheme': 'dynamic',
    'fmt': 'e4m3',
    'quant_method': 'fp8',
    'weight_block_size': [128, 128],
  },
  'rms_norm_eps': 1e-06,
  'rope_scaling': {
    'beta_fast': 32,
    'beta_slow': 1,
    'factor': 40,
    'mscale': 1.0,
    'mscale_all_dim': 1.0,
    'original_max_position_embeddings': 4096,
    'type': 'yarn',
  },
  'rope_theta': 10000,
  'routed_scaling_factor': 2.5,
  'scoring_func': 'sigmoid',
  'tie_word_embeddings': False,
  'topk_group': 4,
  'topk_method': 'noaux_tc',
  'torch_dtype': 'bfloat16',
  'v_head_dim': 128,
  'vocab_size': 129280,
}


def test_deepseek_v3_itself(tmp_path):
  """Its config.json is configs/deepseek_v3.py; its files hold 671.03e9 + 11.61e9 numbers and two copies of V x D."""
  model = hf_config.from_hf(DEEPSEEK_V3, tmp_path)
  ours = from_config_dict(deepseek_v3.get_config())
  assert model == dataclasses.replace(ours.model, init_std=0.02)
  written = hf_config.to_hf(dataclasses.replace(ours, model=model), 'bfloat16', 0)
  kept = DEEPSEEK_V3.keys() - {'aux_loss_alpha', 'ep_size', 'quantization_config', 'rope_scaling'}
  assert {name: written[name] for name in kept} == {name: DEEPSEEK_V3[name] for name in kept}
  assert written['rope_scaling'].items() >= DEEPSEEK_V3['rope_scaling'].items()
  shapes = {name: leaf.shape for name, leaf in flatten(transformer.abstract_params(Config(model=model))).items()}
  shapes['bias_LE'] = (59, 256)
  numbers = lambda tensors: sum(math.prod(tensor.shape(shapes)) for tensor in tensors)
  assert round(numbers(names.table(model)) / 1e9, 2) == 682.64
  assert numbers(names.copies(model)) == 2 * 129280 * 7168


def test_rules_that_remember_more(tiny_model, tmp_path):
  """A run whose checkpoint holds more of its bias rule than the bias."""
  config = Config(model=tiny_model, balance=BalanceConfig(bias_rule='smebu'))
  arrays = random_arrays(config)
  run = make_run(tmp_path / 'run', config, arrays, balance={'momentum_LE': jnp.ones((4, 8))})
  to_hf.export_run(run, tmp_path / 'hf', 'float32')
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  found_E = load_file(file)['model.layers.4.mlp.gate.e_score_correction_bias']
  np.testing.assert_array_equal(found_E, arrays['bias_LE'][3])


def test_damaged_runs(tiny_model, tmp_path):
  config = Config(model=tiny_model)
  run, target = make_run(tmp_path / 'run', config, random_arrays(config)), tmp_path / 'hf'
  step = run / 'checkpoints' / '7'
  meta, sealed = step / 'meta' / 'metadata', (step / 'meta' / 'metadata').read_text()
  for item, noticed in (('optimizer', False), ('balance', True), ('params', True)):
    file = step / item / 'manifest.ocdbt'
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if noticed:
      with pytest.raises(UserError, match=f'checkpoint .*/7 is damaged: {item}/manifest.ocdbt is not as'):
        RunWeights(run, array_shapes(config.model))
    else:
      assert RunWeights(run, array_shapes(config.model)).remarks == []  # is not read
    file.write_bytes(whole)
  # The rest is what is noticed in a checkpoint of an earlier version, which has no digests.
  (step / 'digests.json').unlink()
  text = json.dumps({key: value for key, value in json.loads(sealed).items() if key != 'digests'})
  meta.write_text(text)
  assert 'has no digests' in RunWeights(run, array_shapes(config.model)).remarks[0]
  meta.write_text(text.replace('moe-lossfree-1', 'other-2'))
  with pytest.raises(UserError, match="is not of this program: format 'other-2'"):
    to_hf.export_run(run, target)
  meta.write_text('{')
  with pytest.raises(UserError, match='is damaged or foreign'):
    to_hf.export_run(run, target)
  meta.write_text(text)
  store = ts.KvStore.open({'driver': 'ocdbt', 'base': f'file://{run}/checkpoints/7/params/'}).result()
  lost = 'layers.experts.w_up_eDF/0.0.0.0'
  chunk = store.read(lost).result().value
  store.delete_range(ts.KvStore.KeyRange(lost, lost + '0')).result()
  with pytest.raises(UserError, match=r'checkpoint .*/7 is damaged: '):
    to_hf.export_run(run, target)
  store.write(lost, chunk).result()
  found = []
  for file in (run / 'checkpoints' / '7' / 'params').rglob('d/*'):
    whole = file.read_bytes()
    file.write_bytes(whole[:100])  # values, a header or the list of what is where; a superseded list does no harm
    try:
      to_hf.export_run(run, target)
      shutil.rmtree(target)
    except UserError as error:
      found.append(str(error))
    file.write_bytes(whole)
  assert len(found) >= 2
  assert all(re.match(r'checkpoint .*/7 is damaged: ', line) for line in found), found
  shutil.rmtree(run / 'checkpoints' / '7')
  with pytest.raises(UserError, match='holds no checkpoint'):
    to_hf.export_run(run, target)
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_tokenizer_goes_along(tiny_model, tmp_path):
  config = Config(model=tiny_model)
  run = make_run(tmp_path / 'run', config, random_arrays(config))
  (run / 'tokenizer.json').write_text('{"type": "byte"}')
  lines = to_hf.export_run(run, tmp_path / 'bytes')
  assert 'no tokenizer.json: this run reads bytes' in lines[-1]
  assert not (tmp_path / 'bytes' / 'tokenizer.json').exists()
  assert json.loads((tmp_path / 'bytes' / 'config.json').read_text())['bos_token_id'] == 256
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, 'b': 1, '<s>': 2}, []))
  tokenizer.post_processor = tokenizers.processors.ByteLevel()
  tokenizer.save(str(run / 'tokenizer.json'))
  to_hf.export_run(run, tmp_path / 'hf')
  exported = tmp_path / 'hf' / 'tokenizer.json'
  assert tokenizers.Tokenizer.from_file(str(exported)).encode('ab').ids == [2, 0, 1]  # a document begins with BOS
  assert load_saved(exported).encode(b'ab').tolist() == [0, 1]  # which our data pipeline adds
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['eos_token_id'] == 2
  assert json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())['bos_token'] == '<s>'
  from_hf.import_run(tmp_path / 'hf', tmp_path / 'again')
  to_hf.export_run(tmp_path / 'again', tmp_path / 'hf_again')
  for folder in ('again', 'hf_again'):
    assert (tmp_path / folder / 'tokenizer.json').read_bytes() == exported.read_bytes()
  imported = json.loads((tmp_path / 'again' / 'config.json').read_text())['config']
  assert imported['data']['tokenizer'] == str(tmp_path / 'again' / 'tokenizer.json')


@pytest.mark.parametrize('mscale', [0.0, 0.7, 1.0])
def test_attention_factor_is_named_for_mscale_0_only(tiny_model, mscale):
  """vLLM takes attention_factor = 1 to mean that mscale does not touch the softmax scale."""
  rope = hf_config.to_hf(Config(model=dataclasses.replace(tiny_model, yarn_mscale=mscale)), 'float32', None)[
    'rope_scaling'
  ]
  assert (rope['mscale'], rope['mscale_all_dim']) == (mscale, mscale)
  assert rope.get('attention_factor') == (None if mscale else 1.0)


def test_yarn_factor_from_the_longest_length(tiny_model, tmp_path):
  """transformers takes the quotient of the two lengths for a missing factor."""
  fields = hf_config.to_hf(Config(model=tiny_model), 'float32', None)
  assert fields['max_position_embeddings'] == 256
  fields['rope_scaling'] = {name: value for name, value in fields['rope_scaling'].items() if name != 'factor'}
  assert hf_config.from_hf(fields, tmp_path).yarn_factor == 4.0


@pytest.mark.parametrize(
  ('changes', 'balance', 'field'),
  [
    ({'attention': 'mha', 'qk_nope_dim': 0, 'q_lora_rank': 0}, {}, 'model.attention'),
    ({'score_fn': 'softmax'}, {}, 'model.score_fn'),
    ({'num_shared_experts': 0}, {}, 'model.num_shared_experts'),
    ({'num_experts': 1, 'top_k': 1, 'num_groups': 1, 'top_groups': 1}, {}, 'model.num_experts'),
    ({}, {'bias_rule': 'multiplicative'}, 'balance.bias_rule'),
  ],
)
def test_what_the_format_cannot_hold(changes, balance, field, tiny_model):
  config = Config(model=dataclasses.replace(tiny_model, **changes), balance=BalanceConfig(**balance))
  with pytest.raises(UserError, match=f'^config {field} = .* cannot be exported'):
    hf_config.to_hf(config, 'float32', None)


def test_refused_exports_leave_nothing(tiny_model, tmp_path, monkeypatch):
  config = Config(model=tiny_model)
  run = make_run(tmp_path / 'run', config, random_arrays(config))
  target = tmp_path / 'hf'
  with pytest.raises(UserError, match='is not a run directory'):
    to_hf.export_run(tmp_path, target)
  with pytest.raises(UserError, match="dtype 'int8' must be one of"):
    to_hf.export_run(run, target, 'int8')
  with pytest.raises(UserError, match='max_shard_gb = 0'):
    to_hf.export_run(run, target, max_shard_gb=0)
  with pytest.raises(UserError, match='exists already'):
    to_hf.export_run(run, run)
  with pytest.raises(UserError, match='hf is where a run keeps its tokenizer'):
    to_hf.export_run(run, run / 'hf')
  other = make_run(tmp_path / 'other', config, random_arrays(config))
  text = (other / 'config.json').read_text().replace('"d_ff": 12', '"d_ff": 13')
  (other / 'config.json').write_text(text)
  with pytest.raises(UserError, match='does not fit the model'):
    to_hf.export_run(other, target)

  def full(file, tensors):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(shards, 'write_file', full)
  with pytest.raises(UserError, match=f'cannot write {target}: No space left on device'):
    to_hf.export_run(run, target)
  monkeypatch.setattr(to_hf.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=5))
  with pytest.raises(UserError, match='has 5 free'):
    to_hf.export_run(run, target)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['other', 'run']
