"""The suites of experiments/bench.py at the smallest sizes: their checks, and the rows they make."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from processes import environment

from configs import h200
from moe.bench import fp8, gemm, generate, layer, peers, profile, rows, scaling, speculate, timing
from moe.bench import step as step_suite
from moe.config import Config, ModelConfig, OptimizerConfig, PrecisionConfig, TrainConfig, from_config_dict
from moe.data.tokenizer import ByteTokenizer
from moe.errors import UserError
from moe.inference.load import Model
from moe.parallel.mesh import make_mesh
from moe.train import state
from moe.train.step import resolve

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / 'experiments'
SHAPE = layer.Shape(D=32, F=16, E=4, K=2, T=64)
GEMM_SHAPE = gemm.Shape(M=64, D=128, F=128, E=4)


def test_gemm_rows():
  found = gemm.measure(GEMM_SHAPE, ('blocked',), jnp.float32, 1, 1)
  assert [row['name'] for row in found] == ['dense', 'blocked']
  assert all(row['s'] > 0 and row['tflop_per_s'] > 0 for row in found)
  assert rows.geometric_means(found) == {}, 'without torch there is nothing to compare with'


def test_fp8_rows():
  found = fp8.measure(GEMM_SHAPE, 'blocked', 1, 1)
  assert [row['name'] for row in found] == [
    'fp8 blocked', 'fp8 blocked dw', 'quantize rows', 'quantize rows both ways', 'turn rows', 'quantize matrices',
  ]  # fmt: skip


def test_layer_rows(monkeypatch):
  monkeypatch.setattr(peers, 'missing', lambda: 'none here')
  found = layer.measure(SHAPE, 'float32', dense_tflop_per_s=1.0, repeats=1, inner=1, profiled=True)
  assert [row['name'] for row in found] == ['ours float32', 'ours fp8']
  plain, low = found
  assert plain['of_dense'] == plain['tflop_per_s'] == pytest.approx(SHAPE.tflop / plain['s'])
  assert plain['error_dw'] < 1e-4 < 0.01 < low['error_dw']
  assert plain['peak_gib'] > 0
  assert 'dot' in plain['kernels']
  assert plain['profile']
  assert all(ms > 0 and launches > 0 for _, ms, launches in plain['profile'])


def test_flops_of_a_layer():
  """Router, and K + 1 experts of three matrices; backward is twice forward."""
  assert SHAPE.tflop * 1e12 == 64 * 3 * 2 * (32 * 4 + 3 * 3 * 32 * 16)


@pytest.mark.parametrize(('shared', 'matrices'), [(0, 2), (3, 5)])
def test_a_layer_with_other_shared_experts(monkeypatch, shared, matrices):
  monkeypatch.setattr(peers, 'missing', lambda: 'none here')
  shape = SHAPE._replace(shared=shared)
  plain, _ = layer.measure(shape, 'float32', dense_tflop_per_s=1.0, repeats=1, inner=1)
  assert max(plain['error_y'], plain['error_dx'], plain['error_dw']) < 1e-4
  assert plain['shape'] == f'D32 F16 E4 K2 T64 shared{shared}'
  assert shape.tflop * 1e12 == 64 * 3 * 2 * (32 * 4 + matrices * 3 * 32 * 16)


def test_a_wrong_layer_is_a_row_that_failed(monkeypatch):
  """A layer whose output is 1% off does not get a time."""
  monkeypatch.setattr(peers, 'missing', lambda: 'none here')
  build = layer.build

  def wrong(*arguments):
    compiled = build(*arguments)

    def call(*inputs):
      y_TD, grads = compiled(*inputs)
      return 1.01 * y_TD, grads

    return call

  monkeypatch.setattr(layer, 'build', wrong)
  row, *_ = layer.measure(SHAPE, 'float32', 1.0, 1, 1)
  assert 'is allowed' in row['failed']
  assert 's' not in row


def test_scaling_rows_and_plot(tmp_path):
  found = scaling.measure(SHAPE, (4, 8), (64,), 'float32', dense_tflop_per_s=1.0, repeats=1, inner=1)
  assert [(row['name'], row['count']) for row in found] == [
    ('over experts', 4),
    ('over experts', 8),
    ('over tokens', 64),
  ]
  assert found[0]['of_first_per_token'] == found[2]['of_first_per_token'] == 1
  assert found[1]['of_first_per_token'] == pytest.approx(found[1]['s'] / found[0]['s'])
  scaling.plot(found, tmp_path / 'scaling.png')
  assert (tmp_path / 'scaling.png').read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def small():
  config = from_config_dict(h200.get_config())
  return dataclasses.replace(
    config,
    model=ModelConfig(
      vocab_size=128, d_model=32, num_layers=2, d_ff=32, d_expert=16, num_experts=4, top_k=2, mtp_depth=0
    ),
    data=dataclasses.replace(config.data, seq_len=16),
    train=TrainConfig(batch_size=4),
    optimizer=OptimizerConfig(warmup_steps=1),
    precision=PrecisionConfig(),
  )


def test_step_row(small):
  row = step_suite.contender(step_suite.OURS, small, repeats=3)
  assert abs(row['loss_first'] - math.log(128)) < 0.2
  assert row['loss_last'] < row['loss_first']
  assert row['tokens_per_s'] == pytest.approx(4 * 16 / row['s'])
  assert row['tflop_per_s'] > 0
  assert row['peak_gib'] > 0


def test_step_runs_the_model_of_the_config_on_a_gpu_only():
  config = from_config_dict(h200.get_config())
  assert step_suite.sized(config, 'hopper').model == config.model
  assert step_suite.sized(config, 'cpu').model.d_model == 128


@pytest.mark.parametrize(
  ('losses', 'message'),
  [([4.8, math.nan], 'nan'), ([6.0, 5.0], 'far from ln 128'), ([4.8, 4.9], 'does not fall')],
)
def test_step_refuses_losses_that_are_not_of_a_training(losses, message):
  with pytest.raises(AssertionError, match=message):
    step_suite.check(losses, 128, falling=True)


def test_contenders_of_a_step_are_processes_of_their_own(small):
  """Noise before the row is skipped, and a process that fails is a row, too."""
  rate = {step_suite.OURS: 2.0, peers.NAME: 4.0}

  def command(name):
    text = f'print("noise")\nprint({json.dumps(json.dumps({"tflop_per_s": rate.get(name)}))})'
    return [sys.executable, '-c', text if name in rate else 'raise SystemExit(3)']

  found = step_suite.collect(small, step_suite.CONTENDERS, command, dense_tflop_per_s=8.0)
  shape = '4x16 tokens'
  assert found[0] == {'shape': shape, 'name': 'ours', 'tflop_per_s': 2.0, 'of_dense': 0.25, 'of_peer': 0.5}
  assert 'exit status 3' in found[1]['failed']
  assert found[2]['of_peer'] == 1
  assert rows.geometric_means(found) == {'ours': 0.5}


@pytest.fixture
def generation(monkeypatch):
  """A model to generate with, of widths that MXFP4 can have, short prompts and a short array to time memory by."""
  measure_memory = generate.memory_bytes_per_s
  monkeypatch.setattr(generate, 'PROMPT', 6)
  monkeypatch.setattr(generate, 'NEW', 4)
  monkeypatch.setattr(generate, 'BATCHES', (2,))
  monkeypatch.setattr(generate, 'memory_bytes_per_s', lambda _: measure_memory(2**16))
  model = ModelConfig(
    vocab_size=50, d_model=32, num_layers=2, d_ff=32, d_expert=32, num_experts=4, top_k=2, num_heads=2, mtp_depth=0
  )
  return Config(model=model)


def test_generate_rows(generation, monkeypatch):
  monkeypatch.setattr(peers, 'missing', lambda: 'none here')
  found = generate.measure(generation, repeats=1, devices=2)
  assert [row['name'] for row in found] == ['ours float32', 'ours fp8', 'ours mxfp4']
  assert all(row['tokens_per_s'] == pytest.approx(2 * 4 / row['s']) for row in found)
  plain, fp8_row, mxfp4 = (row['touched_gb'] for row in found)
  assert plain > fp8_row > mxfp4 > 0


@pytest.fixture
def trained(generation):
  """A Model, as it is loaded, of bytes and with an MTP module."""
  config = dataclasses.replace(generation, model=dataclasses.replace(generation.model, vocab_size=257, mtp_depth=1))
  device_mesh = make_mesh(config)
  config = resolve(config, device_mesh, 'cpu')
  made = state.create(config, device_mesh)
  return Model(config, device_mesh, made.params, made.balance['bias_LE'], ByteTokenizer(), 0, (), [])


def test_speculate_rows(trained, monkeypatch):
  monkeypatch.setattr(speculate, 'NEW', 9)
  monkeypatch.setattr(speculate, 'DRAFTS', (0, 2))
  plain, drafted, _, sampled = speculate.measure(trained, repeats=2)
  assert (plain['of_plain'], plain['same_tokens']) == (1, 1)
  assert drafted['same_tokens'] == 1, 'greedy speculation writes what greedy decoding does'
  assert drafted['of_plain'] == pytest.approx(drafted['decode_tokens_per_s'] / plain['decode_tokens_per_s'])
  for row in (drafted, sampled):
    first, second = (float(share.rstrip('%')) for share in row['accepted'].split())
    assert 0 <= second <= first <= 100, 'a draft stays only if the one before it does'
    assert 1 <= row['tokens_per_step'] <= 3


def test_speculation_needs_an_mtp_module(trained):
  config = dataclasses.replace(trained.config, model=dataclasses.replace(trained.config.model, mtp_depth=0))
  with pytest.raises(UserError, match='needs a model with an MTP module'):
    speculate.measure(trained._replace(config=config), repeats=1)


def test_bytes_that_a_step_touches(generation):
  """Everything but the embedding, and of 4 experts, 2 per token, 3 of 4 on average when two tokens choose."""
  expert, rest = jnp.zeros((4, 8, 8)), jnp.zeros((5, 5))
  ready = {
    'w_embedding_VD': rest,
    'w_head_DV': rest,
    'layers': [{'experts': {'w_up_eDF': expert}, 'w_router_DE': rest}],
  }
  assert generate.touched_bytes(ready, generation, batch=2) == 4 * (2 * 25 + 0.75 * 4 * 64)


def test_geometric_means_over_shapes():
  rates = {('a', 'torch x'): 2.0, ('a', 'ours'): 4.0, ('b', 'torch x'): 1.0, ('b', 'ours'): 0.5, ('b', 'dense'): 9.0}
  found = [{'shape': shape, 'name': name, 'tflop_per_s': rate} for (shape, name), rate in rates.items()]
  found += [{'shape': 'c', 'name': 'ours', 'tflop_per_s': 7.0}, {'shape': 'a', 'name': 'quantize', 'gb_per_s': 1.0}]
  assert rows.geometric_means(found) == {'ours': pytest.approx(1.0)}


def test_show_prints_and_writes(tmp_path, capsys):
  found = [
    {'shape': 'a', 'name': 'ours', 'tflop_per_s': 1.5, 'profile': [('kernel_of_mine', 2.0, 3.0)]},
    {'shape': 'a', 'name': 'torch', 'tflop_per_s': 1.0},
  ]
  rows.show('layer', 'a machine', found, ['a note', ''], str(tmp_path / 'out.json'))
  printed = capsys.readouterr().out
  assert 'kernel_of_mine' in printed
  assert printed.index('a machine') < printed.index('a note') < printed.index('geometric mean')
  assert printed.endswith('ours 1.500\n')
  written = json.loads((tmp_path / 'out.json').read_text())
  assert written['results'][0]['profile'][0][0] == 'kernel_of_mine'
  assert written['geometric_mean_of_peer'] == {'ours': pytest.approx(1.5)}


def test_top_kernels_counts_calls():
  x = jnp.ones((64, 64))
  call = functools.partial(jax.jit(lambda x: jnp.sin(x @ x)), x)
  found = profile.top_kernels(call, calls=2)
  assert found == sorted(found, key=lambda row: -row[1])
  assert found
  assert all(ms > 0 and launches == 1 for _, ms, launches in found)
  assert len(profile.table(found).splitlines()) == len(found)


@pytest.mark.parametrize(
  ('path', 'message'),
  [('found.png', 'must end in .json'), ('nowhere/found.json', "no folder 'nowhere'")],
)
def test_where_nothing_can_be_written_nothing_is_measured(path, message, tmp_path):
  command = [sys.executable, str(EXPERIMENTS / 'bench.py'), '--suite=gemm', f'--json={path}']
  done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, '')
  assert message in done.stderr
  assert done.stderr.count('\n') == 1


def test_dense_rate_is_a_rate():
  assert timing.dense_tflop_per_s(64, 'float32', 1, 1) > 0


@pytest.fixture
def torch_peer():
  if peers.missing():
    pytest.skip(peers.missing())


@pytest.mark.usefixtures('torch_peer')
@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_hugging_faces_layer_computes_the_same(compute):
  found = layer.measure(SHAPE, compute, 1.0, 1, 1)
  assert found[-1]['name'] == peers.NAME
  assert 'failed' not in found[-1]
  assert found[0]['of_peer'] == pytest.approx(found[0]['tflop_per_s'] / found[-1]['tflop_per_s'])


@pytest.mark.usefixtures('torch_peer')
def test_hugging_faces_step(small):
  row = step_suite.contender(peers.NAME, small, repeats=3)
  assert abs(row['loss_first'] - math.log(128)) < 0.2
  assert row['tokens_per_s'] > 0


@pytest.mark.usefixtures('torch_peer')
def test_transformers_generates_the_same_tokens(generation):
  found = generate.measure(generation, repeats=1)
  assert found[-1]['name'] == peers.NAME
  assert found[-1]['same_tokens'] == 1
  assert all('of_peer' in row for row in found)
