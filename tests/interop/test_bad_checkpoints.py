"""Folders that are no DeepSeek-V3 checkpoint, or a broken one: one line that names the fault, and nothing written."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from our_runs import make_run, random_arrays
from safetensors.numpy import load_file, save_file

from moe.config import Config
from moe.errors import UserError
from moe.files import digests
from moe.interop import from_hf, hf_config, shards, to_hf

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIRST = 'model-00001-of-00003.safetensors'
LAST = 'model-00003-of-00003.safetensors'


@pytest.fixture(scope='module')
def exported(tiny_model, tmp_path_factory):
  """A good checkpoint in three files."""
  folder = tmp_path_factory.mktemp('exported')
  config = Config(model=tiny_model)
  run = make_run(folder / 'run', config, random_arrays(config))
  to_hf.export_run(run, folder / 'hf', 'float32', 40e3 / 1e9)
  assert (folder / 'hf' / LAST).exists()
  (folder / 'hf' / digests.FILE).unlink()  # as folders of others have none
  return folder / 'hf'


@pytest.fixture
def broken(exported, tmp_path):
  """A copy to break."""
  return shutil.copytree(exported, tmp_path / 'hf')


def refused(broken, what):
  """Asserts that the import says `what` in one line and leaves nothing."""
  run = broken.parent / 'run'
  with pytest.raises(UserError) as caught:
    from_hf.import_run(broken, run)
  assert what in str(caught.value)
  assert '\n' not in str(caught.value)
  assert [path.name for path in broken.parent.iterdir()] == ['hf']


def change_config(folder, **changes):
  fields = json.loads((folder / 'config.json').read_text()) | changes
  (folder / 'config.json').write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


MXFP4 = hf_config.QUANTIZATION['mxfp4']
INT4 = MXFP4['config_groups']['group_0']['weights'] | {'type': 'int'}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64}


@pytest.mark.parametrize(
  ('changes', 'what'),
  [
    ({'model_type': 'llama'}, "model_type = 'llama'"),
    ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
    ({'attention_bias': True}, 'attention_bias = True'),
    ({'scoring_func': 'softmax'}, "scoring_func = 'softmax'"),
    ({'topk_method': 'greedy'}, "topk_method = 'greedy'"),
    ({'moe_layer_freq': 2}, 'moe_layer_freq = 2'),
    ({'rope_interleave': False}, 'rope_interleave = False'),
    ({'num_key_value_heads': 1}, 'num_key_value_heads = 1'),
    ({'kv_lora_rank': ...}, 'config.json lacks kv_lora_rank'),
    ({'hidden_size': 'wide'}, "model.d_model = 'wide'"),
    ({'n_shared_experts': 0}, 'model.num_shared_experts = 0'),
    ({'first_k_dense_replace': 3}, 'model.num_dense_layers = 3'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'rope_scaling = '),
    ({'rope_scaling': YARN}, 'rope_scaling.mscale = 0.0 and mscale_all_dim = 0.0'),
    ({'rope_scaling': YARN | {'mscale': 1.0, 'mscale_all_dim': 0.7}}, 'mscale_all_dim = 0.7'),
    ({'rope_scaling': YARN | {'attention_factor': 1.0, 'truncate': False}}, 'rope_scaling.truncate = False'),
    ({'rope_scaling': 'yarn'}, "rope_scaling = 'yarn'"),
    ({'rope_scaling': YARN | {'factor': 'four'}}, 'not a set of numbers'),
    ({'rope_scaling': YARN | {'factor': 10**400}}, 'not a set of numbers'),
    ({'rms_norm_eps': 10**400}, 'must be a finite number'),
    ({'rope_scaling': YARN | {'partial_rotary_factor': 0.5}}, 'rope_scaling = '),
    ({'quantization_config': {'quant_method': 'gptq'}}, "quantization_config = {'quant_method': 'gptq'}"),
    ({'quantization_config': MXFP4 | {'config_groups': {'group_0': {'weights': INT4}}}}, "'type': 'int'"),
    ({'quantization_config': MXFP4 | {'config_groups': ['Linear']}}, "config_groups = ['Linear']"),
    ({'quantization_config': {'quant_method': 'fp8', 'weight_block_size': [64, 64]}}, 'only fp8 in blocks of 128x128'),
  ],
)
def test_config_that_we_cannot_represent(broken, changes, what):
  change_config(broken, **changes)
  refused(broken, what)


@pytest.mark.parametrize(
  ('text', 'what'),
  [
    (None, 'it has no config.json'),
    ('{', 'is no valid JSON'),
    ('[]', 'holds no JSON object, but list'),
    ('{"a":' * 100_000, 'nested too deeply'),
  ],
)
def test_no_config(broken, text, what):
  (broken / 'config.json').unlink()
  if text is not None:
    (broken / 'config.json').write_text(text)
  refused(broken, what)


def test_missing_and_damaged_files(broken):
  content = (broken / LAST).read_bytes()
  (broken / LAST).write_bytes(content[:-10])
  refused(broken, f'{LAST} is truncated')
  (broken / LAST).write_bytes(b'')
  refused(broken, f'{LAST} is truncated')
  (broken / LAST).write_bytes(b'no safetensors' * 9)
  refused(broken, f'{LAST} is truncated or no safetensors file')
  (broken / LAST).unlink()
  refused(broken, f'names {LAST}, which is missing')


@pytest.mark.parametrize(
  ('index', 'what'),
  [
    ('{', f'{{}}/{shards.INDEX} is no valid JSON'),
    (json.dumps({'weight_map': {'a': 'b' * 300}}), 'which is missing'),
    ('{"weight_map": 3}', f'cannot read {{}}/{shards.INDEX}'),
    ('{"weight_map": {"a": "../b.safetensors"}}', 'names files outside of its folder'),
    ('{"weight_map": {"a": "b.safetensors"}}', 'names b.safetensors, which is missing'),
    (json.dumps({'weight_map': {'a': FIRST}}), f'{FIRST} lacks a, which'),
  ],
)
def test_broken_index(broken, index, what):
  (broken / shards.INDEX).write_text(index)
  refused(broken, what.format(broken))


def test_index_and_files_disagree(broken):
  index = json.loads((broken / shards.INDEX).read_text())
  index['weight_map']['model.extra.weight'] = LAST
  (broken / shards.INDEX).write_text(json.dumps(index))
  refused(broken, f'{LAST} lacks model.extra.weight')
  (broken / shards.INDEX).unlink()
  refused(broken, 'has no weights')


NORM, GATE = 'model.norm.weight', 'model.layers.2.mlp.gate.weight'
FP8 = np.ones((8, 16), ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
  ('changes', 'what'),
  [
    ({'model.layers.1.self_attn.q_a_proj.bias': np.ones(7, np.float32)}, 'unknown tensor model.layers.1.self_attn.q_a'),
    ({'model.layers.5.enorm.weight': np.ones(16, np.float32)}, 'unknown tensor model.layers.5.enorm.weight'),
    ({'unknown.weight_scale_inv': np.ones((1, 1), np.float32)}, 'unknown tensor unknown.weight_scale_inv'),
    ({NORM: None}, f'tensor {NORM} is missing'),
    ({'model.layers.4.mlp.experts.7.up_proj.weight': None}, 'model.layers.4.mlp.experts.7.up_proj.weight is missing'),
    ({NORM: np.ones(17, np.float32)}, f'{NORM} has shape [17] and must have [16]'),
    ({GATE: np.ones((16, 8), np.float32)}, f'{GATE} has shape [16, 8] and must have [8, 16]'),
    ({GATE: np.ones((8, 16), np.int32)}, f'{GATE} is I32 and must be one of'),
    ({NORM: np.ones(16, ml_dtypes.float8_e4m3fn)}, f'{NORM} is F8_E4M3'),
    ({GATE: FP8}, f'{GATE}_scale_inv is missing'),
    ({GATE: FP8, f'{GATE}_scale_inv': np.ones((2, 1), np.float32)}, f'{GATE}_scale_inv is F32 [2, 1] and must be F32'),
    ({f'{GATE}_scale_inv': np.ones((1, 1), np.float32)}, f'{GATE}_scale_inv does not belong to a weight of F32'),
    ({'model.layers.3.embed_tokens.weight': np.ones((40, 16), np.float32)}, 'differs from model.embed_tokens.weight'),
    ({'model.layers.4.shared_head.head.weight': np.ones((40, 16), np.float32)}, 'differs from lm_head.weight'),
  ],
)
def test_every_tensor_is_accounted_for(broken, changes, what):
  tensors = {name: value for file in broken.glob('*.safetensors') for name, value in load_file(file).items()}
  for file in broken.glob('*.safetensors*'):
    file.unlink()
  kept = {name: value for name, value in (tensors | changes).items() if value is not None}
  save_file(kept, broken / shards.SINGLE)
  refused(broken, what)


UP = 'model.layers.1.mlp.experts.0.up_proj.weight'  # [6, 32] in the checkpoint below
PACKED, SCALE = np.ones((6, 16), np.uint8), np.ones((6, 1), np.uint8)


@pytest.mark.parametrize(
  ('changes', 'what'),
  [
    ({f'{UP}_packed': PACKED}, f'{UP} is mxfp4 and {UP}_scale is missing'),
    ({f'{UP}_packed': PACKED, f'{UP}_scale': SCALE[:5]}, f'{UP}_scale is U8 [5, 1] and must be U8 [6, 1]'),
    ({f'{UP}_packed': PACKED[:, :8], f'{UP}_scale': SCALE}, f'{UP}_packed is U8 [6, 8] and must be U8 [6, 16]'),
    ({f'{UP}_packed': PACKED.astype(np.int8), f'{UP}_scale': SCALE}, f'{UP}_packed is I8 [6, 16] and must be U8'),
    ({f'{UP}_packed': PACKED, f'{UP}_scale': SCALE, UP: np.ones((6, 32), np.float32)}, f'{UP} does not belong to'),
    ({UP: np.ones((6, 32), np.uint8)}, f'{UP} is U8 and must be one of'),
    ({f'{UP}_scale': SCALE}, f'{UP} is missing'),
    ({f'{UP}_scale': SCALE, UP: np.ones((6, 32), np.float32)}, f'{UP}_scale does not belong to a weight of F32'),
  ],
)
def test_mxfp4_is_accounted_for(changes, what, tiny_model, tmp_path):
  config = Config(model=dataclasses.replace(tiny_model, d_model=32, mtp_depth=0))
  to_hf.export_run(make_run(tmp_path / 'run', config, random_arrays(config)), tmp_path / 'hf')
  (tmp_path / 'hf' / digests.FILE).unlink()
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  tensors = load_file(file)
  del tensors[UP]
  save_file(tensors | changes, file)
  index = {'weight_map': dict.fromkeys(tensors | changes, file.name)}
  (tmp_path / 'hf' / shards.INDEX).write_text(json.dumps(index))
  shutil.rmtree(tmp_path / 'run')
  refused(tmp_path / 'hf', what)


def test_vocabularies_disagree(broken):
  """config.json and the embedding; the tokenizer and config.json."""
  change_config(broken, vocab_size=41)
  refused(broken, 'model.embed_tokens.weight has shape [40, 16] and must have [41, 16]')
  change_config(broken, vocab_size=40)
  (broken / 'tokenizer.json').write_text('{"model": 3}')
  refused(broken, f'cannot read {broken}/tokenizer.json')
  vocabulary = {'a': 0, 'b': 1, '<s>': 40}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, 'a')).save(str(broken / 'tokenizer.json'))
  refused(broken, 'tokenizer.json has a token 40 and the model a vocabulary of 40')


def test_existing_run_is_left_alone(exported, tmp_path):
  with pytest.raises(UserError, match='exists already'):
    from_hf.import_run(exported, tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_convert_from_outside(exported, tmp_path):
  """The script: a good import, and one line with exit status 2 for a folder that is no checkpoint."""
  command = [sys.executable, ROOT / 'experiments' / 'convert.py']
  good = [*command, f'--from_hf={exported}', f'--run={tmp_path / "run"}']
  result = subprocess.run(good, capture_output=True, text=True, timeout=100)
  assert result.returncode == 0, result.stderr
  assert f'train.init_from={tmp_path / "run"}' in result.stdout
  bad = [*command, f'--from_hf={tmp_path}', f'--run={tmp_path / "other"}']
  result = subprocess.run(bad, capture_output=True, text=True, timeout=100)
  assert result.returncode == 2
  assert result.stderr == f'error: {tmp_path} is not a Hugging Face checkpoint: it has no config.json\n'
  assert [path.name for path in tmp_path.iterdir()] == ['run']
