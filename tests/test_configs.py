"""Every file in configs/ runs as it stands, and the models of papers have the sizes of the papers."""

import ast
import importlib.util
from pathlib import Path

import jax
import pytest

from moe.config import Config, from_config_dict
from moe.model import transformer
from moe.parallel import mesh
from moe.train import state, step
from moe.validation import parameters

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / 'configs').glob('*.py'))}

MHA = 'model.attention=mha,model.qk_nope_dim=0,model.q_lora_rank=0,model.mtp_depth=0'


def load(name, arg=''):
  spec = importlib.util.spec_from_file_location(name, CONFIGS[name])
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return from_config_dict(module.get_config(arg))


def docstring(name):
  return ast.get_docstring(ast.parse(CONFIGS[name].read_text('utf-8')))


def billions(count):
  return f'{count / 1e9:.2f}e9'


def test_the_known_configs_are_there():
  assert {'default', 'tiny', 'deepseek_v3', 'loss_free_1b', 'loss_free_3b', 'h200'} <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_valid_fits_its_mesh_and_has_a_state(name):
  config = load(name)
  mesh.validate_mesh(config, mesh.mesh_shape(config.mesh))
  made = state.abstract(config)
  model = config.model
  assert made.balance['bias_LE'].shape == (
    model.num_layers - model.num_dense_layers + model.mtp_depth,
    model.num_experts,
  )
  assert all(leaf.dtype == 'float32' for leaf in jax.tree.leaves(made.params))
  # The rest of a state is a little over two moments per weight, in their own dtype.
  moments = [leaf for leaf in jax.tree.leaves(made.opt_state) if leaf.dtype == config.optimizer.moments]
  assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(made.params))


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('arg', ['', MHA, 'model.q_lora_rank=0,model.num_shared_experts=0,model.tie_embeddings=true'])
def test_parameters_by_arithmetic(name, arg):
  config = load(name, arg)
  leaves = jax.tree.leaves(transformer.abstract_params(config))
  assert parameters(config.model) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_takes_overrides_and_says_how_it_is_run(name):
  assert load(name, 'train.seed=7').train.seed == 7
  assert f'python experiments/train.py --config=configs/{name}.py' in docstring(name)
  assert f'--workdir=runs/{name}' in docstring(name)


@pytest.mark.parametrize(
  ('name', 'arg', 'total', 'active'),
  [
    ('deepseek_v3', 'model.mtp_depth=0', '671.03e9', '36.63e9'),  # arXiv 2412.19437: 671B and 37B
    ('loss_free_1b', '', '1.05e9', '0.20e9'),
    ('loss_free_3b', '', '3.03e9', '0.48e9'),
    ('h200', '', '4.85e9', '0.77e9'),
  ],
)
def test_parameters_are_those_of_the_docstring(name, arg, total, active):
  counted = state.count_parameters(load(name, arg))
  assert (billions(counted[0]), billions(counted[1])) == (total, active)
  assert total in docstring(name)
  assert active in docstring(name)


def test_mtp_module_of_v3_has_the_papers_size():
  """11.6B beside the shared embedding and head; 256 experts, shared expert, MLA and the projection, counted by hand."""
  d = 7168
  experts = 257 * 3 * d * 2048 + 256 * d
  query = d * 1536 + 1536 + 1536 * 128 * 192
  key_value = d * (512 + 64) + 512 + 512 * 128 * 256
  attention = query + key_value + 128 * 128 * d
  norms = 5 * d  # of hidden state, embedding, attention, feed-forward and output
  by_hand = experts + attention + 2 * d * d + norms
  counted = (
    state.count_parameters(load('deepseek_v3'))[0] - state.count_parameters(load('deepseek_v3', 'model.mtp_depth=0'))[0]
  )
  assert counted == by_hand
  assert billions(by_hand) == '11.61e9'
  assert billions(by_hand) in docstring('deepseek_v3')


def test_steps_of_the_papers_runs_cover_their_tokens():
  for name, tokens in (('deepseek_v3', 14.8e12), ('loss_free_1b', 100e9), ('loss_free_3b', 200e9)):
    config = load(name)
    assert config.train.steps * config.train.batch_size * config.data.seq_len == pytest.approx(tokens, rel=1e-4)


def test_default_is_the_defaults():
  assert load('default') == Config()


def test_v3_stops_its_bias_for_the_papers_last_500b_tokens():
  config = load('deepseek_v3')
  speed = step.bias_speed(config.balance, config.train.steps)
  last = round(config.train.steps * (14.8 - 0.5) / 14.8)
  assert float(speed(0.99 * last)) == pytest.approx(0.001)
  assert float(speed(1.01 * last)) == 0
