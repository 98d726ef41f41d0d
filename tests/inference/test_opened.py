"""`moe.open(...).route(...)` against a router in numpy, against the loads of an evaluation, and on meshes."""

import dataclasses

import jax
import numpy as np
import pytest
from interop.our_runs import make_run, random_arrays

import moe
from moe.config import Config, MeshConfig
from moe.data.tokenizer import ByteTokenizer
from moe.errors import UserError
from moe.interop import to_hf
from moe.model import layer as layers
from moe.train import step

TEXT = 'naïve = ["a", 1]\n' * 3


@pytest.fixture(scope='module')
def run(tiny_model, tmp_path_factory):
  """A run of random weights whose text is bytes."""
  sizes = {'vocab_size': 257, 'num_heads': 8, 'd_ff': 24, 'd_expert': 16}
  config = Config(model=dataclasses.replace(tiny_model, **sizes))
  path = make_run(tmp_path_factory.mktemp('open') / 'run', config, random_arrays(config, 0.4))
  ByteTokenizer().save(path / 'tokenizer.json')
  return path


@pytest.fixture(scope='module')
def opened(run):
  return moe.open(run)


def in_numpy(x_TD, w_DE, bias_E, model):
  """experts [T, K] and weights [T, K] by the definition (arXiv 2412.19437, equations 12 to 16, and groups), float64."""
  score_TE = 1 / (1 + np.exp(-x_TD.astype(np.float64) @ w_DE.astype(np.float64)))
  expert_TK, weight_TK = [], []
  for score_E in score_TE:
    biased_Ge = (score_E + bias_E).reshape(model.num_groups, -1)
    group_score = np.sort(biased_Ge, 1)[:, -2:].sum(1)
    closed = np.argsort(-group_score)[model.top_groups :]
    biased_Ge[closed] = -np.inf
    chosen_K = np.argsort(-biased_Ge.ravel())[: model.top_k]
    expert_TK.append(chosen_K)
    weight_TK.append(model.route_scale * score_E[chosen_K] / score_E[chosen_K].sum())
  return np.array(expert_TK), np.array(weight_TK)


def test_a_router_in_numpy_decides_the_same(opened, monkeypatch):
  """From what the routers of the forward pass read, caught on the way."""
  caught, route, model = [], layers.route, opened.model.config.model

  def catching(x_TD, w_router_DE, bias_E, mask_T, *rest):
    jax.debug.callback(lambda *arrays: caught.append(jax.tree.map(np.asarray, arrays)), x_TD, w_router_DE, bias_E)
    return route(x_TD, w_router_DE, bias_E, mask_T, *rest)

  monkeypatch.setattr(layers, 'route', catching)
  again = dataclasses.replace(opened, _step=step.make_eval_step(opened.model.config, opened.model.mesh))
  routes = again.route(TEXT)
  jax.effects_barrier()
  assert len(caught) == len(routes.layers) == 4
  by_bias = {bias_E.tobytes(): (x_TD, w_DE, bias_E) for x_TD, w_DE, bias_E in caught}
  tokens = len(routes.token_ids)
  for row, bias_E in enumerate(np.asarray(opened.model.bias_LE)):
    x_TD, w_DE, _ = by_bias[bias_E.tobytes()]
    asked = tokens - max(0, row - model.num_moe_layers + 1)
    expert_TK, weight_TK = in_numpy(x_TD[:asked], w_DE, bias_E, model)
    np.testing.assert_array_equal(routes.experts[row, :asked], expert_TK)
    np.testing.assert_allclose(routes.weights[row, :asked], weight_TK, rtol=1e-5)
    assert (routes.experts[row, asked:] == -1).all()
    assert (routes.weights[row, asked:] == 0).all()


def test_counted_they_are_the_loads_of_an_evaluation(opened):
  config, mesh = opened.model.config, opened.model.mesh
  routes = opened.route(TEXT)
  batch = {key: np.zeros((1, 1, 129), np.int32) for key in ('token_BS', 'segment_BS')}
  batch['token_BS'][0, 0, : len(routes.token_ids)], batch['segment_BS'][0, 0, : len(routes.token_ids)] = (
    routes.token_ids,
    1,
  )
  found = step.make_eval_step(config, mesh)(opened.model.params, opened.model.bias_LE, batch)
  one_hot_LTKE = routes.experts[..., None] == np.arange(config.model.num_experts)
  np.testing.assert_array_equal(one_hot_LTKE.sum((1, 2)), found['load_LE'])
  np.testing.assert_allclose(routes.nats.sum(), found['nats'][0], rtol=1e-5)
  assert routes.nats[-1] == 0


def test_tokens_have_their_text(opened):
  routes = opened.route(TEXT)
  assert ''.join(routes.texts) == TEXT
  assert routes.texts[:5] == ['', 'n', 'a', '', 'ï'], 'BOS, and a character of two bytes'
  assert routes.token_ids[:3].tolist() == [256, ord('n'), ord('a')]
  assert routes.layers == ['layer 1', 'layer 2', 'MTP 0', 'MTP 1']


@pytest.mark.parametrize('sizes', [{'data': 2}, {'expert': 4, 'tensor': 2}], ids=str)
def test_the_same_on_meshes(sizes, opened, run):
  here, there = opened.route(TEXT), moe.open(run, MeshConfig(**sizes)).route(TEXT)
  np.testing.assert_array_equal(there.experts, here.experts)
  np.testing.assert_allclose(there.weights, here.weights, rtol=1e-4)
  np.testing.assert_allclose(there.nats, here.nats, rtol=1e-3, atol=1e-5)


def test_the_same_from_a_hugging_face_folder(opened, run, tmp_path):
  to_hf.export_run(run, tmp_path / 'hf', 'float32')
  here, there = opened.route(TEXT), moe.open(tmp_path / 'hf', compute='float32', tokenizer='byte').route(TEXT)
  rows = len(there.layers)
  np.testing.assert_array_equal(there.experts, here.experts[:rows])
  np.testing.assert_allclose(there.weights, here.weights[:rows], rtol=1e-5)


def test_what_cannot_be_routed_is_one_line(opened):
  for bad, message in (
    ([], 'takes 1 to'),
    ([0, 257], 'outside 0 to 256'),
    ([[1]], 'takes 1 to'),
    (5, 'takes 1 to'),
    ([2**63], 'takes|outside'),
    (b'def', r"takes text or a list of token ids, not b'def'"),
    (None, 'takes text or a list of token ids, not None'),
    (['a'], r"takes text or a list of token ids, not \['a'\]"),
    ([1.5], r'takes text or a list of token ids, not \[1.5\]'),
    ([True], r'takes text or a list of token ids, not \[True\]'),
    ([[1], [2, 3]], r'takes text or a list of token ids, not \[\[1\], \[2, 3\]\]'),
    ([2**70], 'takes text or a list of token ids'),
    ('a\ud800', r"the text 'a\\ud800' is not UTF-8: "),
  ):
    with pytest.raises(UserError, match=message):
      opened.route(bad)
  assert opened.route(np.array([1, 2], np.uint8)).token_ids.tolist() == [1, 2]


@pytest.mark.parametrize('path', [None, '', 5, b'runs/tiny'])
def test_what_is_no_path_is_one_line(path):
  with pytest.raises(UserError, match=f'^path = {path!r} must be the path of a file or folder$'):
    moe.open(path)


def test_a_path_that_has_no_model_is_named(tmp_path):
  with pytest.raises(UserError, match=f'^{tmp_path} is neither a run directory nor a folder'):
    moe.open(tmp_path)
  with pytest.raises(UserError, match=r"^path = 'gs://b/run' is an address"):
    moe.open('gs://b/run')
