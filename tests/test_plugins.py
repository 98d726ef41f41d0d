"""Files of users that add to the registries: what they add, what a run remembers of them, their mistakes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe import plugins
from moe.balance import metrics, rules
from moe.config import BalanceConfig, Config, ModelConfig, from_config_dict, to_config_dict
from moe.errors import UserError
from moe.inference import forward
from moe.model.dispatch import dispatch
from moe.model.layer import attention_block
from moe.ops.decode.add_norm import Stream
from moe.ops.fp8 import grouped_matmul as fp8_matmul
from moe.ops.grouped_matmul import grouped_matmul
from moe.parallel.resolved import Resolved
from moe.registry import DISPATCHERS
from moe.sweep import jobs
from moe.sweep.manifest import RunOf
from moe.sweep.variants import Variant

METRIC = """
import numpy as np
from moe.balance.metrics import metric

@metric('share of the busiest expert')
def top_share(load_LE):
  return load_LE.max(-1) / np.maximum(load_LE.sum(-1), 1)
"""
RULE = """
import jax.numpy as jnp
from moe.balance.rules import Direction, gap
from moe.model.dispatch import local
from moe.registry import BIAS_RULES, DISPATCHERS

class Root(Direction):
  def direction(self, load_LE):
    return jnp.sign(gap(load_LE)) * jnp.sqrt(jnp.abs(gap(load_LE)))

BIAS_RULES.add('root', Root())
DISPATCHERS.add('mine', local.apply)
"""
BAD_ENTRIES = [  # a line of a plugin, what is wrong with it
  ('BIAS_RULES.add("sign", 5)', "there is a bias rule 'sign' already"),
  ('BIAS_RULES.add("x", 3)', "bias rule 'x' must be an object of moe.balance.rules.Rule, not 3"),
  ('from moe.balance.rules.sign import Sign; BIAS_RULES.add("x", Sign)', 'rules.Rule, not the class Sign'),
  ('from moe.balance.rules import Rule; BIAS_RULES.add("x", Rule())', "TypeError: .*abstract class Rule.*'?update'?"),
  ('DISPATCHERS.add("x", None)', "dispatcher 'x' must be an object of collections.abc.Callable, not None"),
  ('DISPATCHERS.add("auto", print)', "'auto' means something else where a dispatcher is named"),
  ('GROUPED_MATMULS.add("x", print)', "matmul 'x' must be an object of moe.ops.grouped_matmul.Backend, not <built-in"),
  ('from moe.ops.grouped_matmul import Backend; Backend(3)', 'a Backend has a function and a row_multiple'),
  ('from moe.ops.grouped_matmul import Backend; Backend(print, 0)', 'a Backend has a function and a row_multiple'),
  ('ATTENTIONS.add("x", BIAS_RULES["sign"])', 'must be an object of moe.model.attention.Attention, not <moe.balance'),
  ('CACHED_ATTENTIONS.add("x", ATTENTIONS["mla"])', 'moe.inference.attention.CachedAttention, not <moe.model'),
  ('from moe.balance.metrics import METRICS; METRICS.add("x", len)', 'must be an object of moe.balance.metrics.Metric'),
  ('BIAS_RULES.add(3, BIAS_RULES["sign"])', 'bias rule 3 must be called by small letters'),
]


@pytest.fixture
def loaded(tmp_path, monkeypatch):
  """loaded(text): runs a plugin of this text and returns its path; what it adds is gone after the test."""
  monkeypatch.setattr(plugins, '_loaded', {})
  for registry in plugins.REGISTRIES.values():
    monkeypatch.setattr(registry, '_entries', dict(registry._entries))
    monkeypatch.setattr(registry, 'added', {})

  def loaded(text, name='mine.py'):
    (tmp_path / name).write_text(text)
    plugins.load([str(tmp_path / name)])
    return tmp_path / name

  return loaded


def test_a_metric_is_measured(loaded):
  path = loaded(METRIC)
  assert metrics.measured([[3, 1], [2, 2]], 'batch')['top_share_batch'] == (0.75 + 0.5) / 2
  assert plugins.description() == [{'kind': 'metric', 'name': 'top_share', 'file': str(path)}]
  plugins.load([str(path)])  # again: it is there
  assert plugins.arguments() == [f'--plugins={path}']


def test_settings_may_name_what_plugins_add(loaded):
  settings = to_config_dict(Config(), 'balance.bias_rule=root,dispatch=mine')
  with pytest.raises(UserError, match=r"balance.bias_rule = 'root' must be one of .*none, "):
    from_config_dict(settings)
  loaded(RULE)
  config = from_config_dict(settings)
  load_LE = jnp.array([[8, 0, 4]])
  state = rules.update(rules.init(config.balance, 1, 3), load_LE, None, jnp.float32(0.5), config.balance)
  np.testing.assert_allclose(state['bias_LE'], [[-1, 1, 0]])
  assert config.dispatch in DISPATCHERS
  with pytest.raises(UserError, match=r"'rot' must be one of .*quantile, .*, root$"):
    from_config_dict(to_config_dict(Config(), 'balance.bias_rule=rot'))


def test_runs_of_a_sweep_get_the_flag(loaded, tmp_path):
  path = loaded(METRIC)
  run = RunOf(Variant('one', {}), 0, Config())
  assert f'--plugins={path}' in jobs.job_of(run, tmp_path).command


def test_what_is_not_there_is_named(loaded, tmp_path):
  path = loaded(METRIC + RULE)
  described = plugins.description()
  plugins.check(described, 'the run')
  del metrics.METRICS._entries['top_share']
  message = f"the run was trained with the metric 'top_share' of a plugin; give --plugins={path} again"
  with pytest.raises(UserError) as caught:
    plugins.check(described, 'the run')
  assert str(caught.value) == message
  plugins.check(described, 'the run', but='metric')
  for damaged in (None, 5, [5], [{'kind': 'metric'}], [{'kind': 1, 'name': 2, 'file': 3}]):
    plugins.check(damaged, 'the run')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = (', r"mine.py', line 1: SyntaxError: '\(' was never closed$"),
    ('x = 1\nx += y', r'line 2: NameError'),
    ('import nowhere', r'line 1: ModuleNotFoundError'),
    (METRIC + METRIC, r"line 12: ValueError: there is a metric 'top_share' already"),
    (METRIC.replace('def top_share', 'def TopShare'), r"line 5: ValueError: metric 'TopShare' must be called by small"),
    (METRIC.replace('top_share', 'val_loss'), "line 5: ValueError: 'val_loss' means something else where a metric is"),
    (METRIC.replace("@metric('share of the busiest expert')", '@metric'), 'line 5: ValueError: @metric needs a title'),
    (METRIC.replace("'share of the busiest expert'", ''), "line 5: TypeError: .*missing .* argument: 'title'"),
    *((f'from moe.registry import *\nx = 5\n{text}', f'line 3: .*{message}') for text, message in BAD_ENTRIES),
  ],
)
def test_mistakes_in_a_file_have_their_line(loaded, text, message):
  with pytest.raises(UserError, match=message) as caught:
    loaded(text)
  assert str(caught.value).startswith("--plugins = '")


def test_no_such_file():
  with pytest.raises(UserError, match='--plugins is no Python file that runs: cannot read'):
    plugins.load(['/nowhere.py'])


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    ('1 / 0', r'line 4: ZeroDivisionError'),
    ('0.5', r"metric 'broken' of --plugins=.*/mine.py must give a finite number for each of 2 layers, not 0.5"),
    ('[1, float("nan")]', 'must give a finite number'),
    ('"text"', "must give a finite number .* not 'text'"),
    ('None', 'must give a finite number .* not None'),
  ],
)
def test_metrics_that_do_not_measure(loaded, body, message):
  loaded(f'from moe.balance.metrics import metric\n@metric("x")\ndef broken(load_LE):\n  return {body}')
  with pytest.raises(UserError, match=message), plugins.blamed():
    metrics.measured([[3, 1], [2, 2]], 'batch')


# ----------------------------------------------------------------------------------- what entries give, where it is due


ENTRIES = """
import jax.numpy as jnp
from moe.balance.rules import Direction, Rule
from moe.ops.grouped_matmul import Backend
from moe.registry import ATTENTIONS, BIAS_RULES, DISPATCHERS, GROUPED_MATMULS

class Bad(Rule):
  def start(self, bias_LE):
    return START
  def statistic(self, routing, bias_E, mask_T, model):
    return STATISTIC
  def update(self, state, load_LE, statistic, gamma, balance):
    return UPDATE

class Pointing(Direction):
  def direction(self, load_LE):
    return DIRECTION

BIAS_RULES.add('bad', Bad())
BIAS_RULES.add('pointing', Pointing())
DISPATCHERS.add('bad', lambda x_TD, routing, experts, resolved: DISPATCHED)
GROUPED_MATMULS.add('bad', Backend(lambda x_MD, w_eDF, size_e: MULTIPLIED))
"""
L, E, T, D = 2, 3, 5, 4
GOOD = {
  'START': '{"bias_LE": bias_LE, "more_LEX": jnp.zeros((2, 3, 7), jnp.int8)}',
  'STATISTIC': 'jnp.zeros((3, 7), jnp.int32)',
  'UPDATE': '{key: value + 1 for key, value in state.items()}',
  'DIRECTION': 'jnp.sign(load_LE)',
  'DISPATCHED': 'x_TD',
  'MULTIPLIED': 'x_MD @ w_eDF[0]',
}


def asked():
  """Asks everything of the entries of ENTRIES where the model asks it, all inside of a jitted function."""
  balance, gamma = BalanceConfig(bias_rule='bad'), jnp.float32(1)
  model, load_LE = ModelConfig(num_experts=E, top_k=1), jnp.ones((L, E), jnp.int32)
  state = rules.start(balance, jnp.zeros((L, E)))
  statistic = rules.statistic(None, jnp.zeros(E), jnp.ones(T, bool), model, balance)
  rules.update(state, load_LE, statistic, gamma, balance)
  pointing = dataclasses.replace(balance, bias_rule='pointing')
  rules.update(rules.init(pointing, L, E), load_LE, statistic, gamma, pointing)
  x_TD = jnp.ones((T, D))
  dispatch(x_TD, None, None, Resolved(dispatch='bad'))
  size_e = jnp.array([2, 1])
  return grouped_matmul(x_TD, jnp.ones((2, D, 6)), size_e, 'bad'), fp8_matmul(x_TD, jnp.ones((2, D, 6)), size_e, 'bad')


def entries(**changes):
  text = ENTRIES
  for word, code in (GOOD | changes).items():
    text = text.replace(word, code)
  return text


def test_entries_that_give_what_is_due(loaded):
  loaded(entries())
  jax.eval_shape(lambda: asked())


@pytest.mark.parametrize(
  ('word', 'code', 'message'),
  [
    ('START', 'bias_LE', r"bias rule 'bad' .* must give start\(\) as a dict with 'bias_LE', not "),
    ('START', '{"total_LE": bias_LE}', r'start\(\) as a dict with'),
    ('START', '{"bias_LE": bias_LE[:, :1]}', r"start\(\)\['bias_LE'\] as an array \[2, 3, ...\], not float32 \[2, 1\]"),
    ('START', '{"bias_LE": bias_LE[..., None]}', r'as float32 \[2, 3\], not float32 \[2, 3, 1\]'),
    ('START', '{"bias_LE": bias_LE.astype(jnp.bfloat16)}', r'as float32 \[2, 3\], not bfloat16 \[2, 3\]'),
    ('START', '{"bias_LE": bias_LE, "step": 0}', r"start\(\)\['step'\] as an array \[2, 3, ...\], not 0"),
    ('STATISTIC', 'jnp.zeros((1, 3), jnp.int32)', r'statistic\(\) as int32 \[3, ...\], not int32 \[1, 3\]'),
    ('STATISTIC', 'bias_E', r'statistic\(\) as int32 \[3, ...\], not float32 \[3\]'),
    ('STATISTIC', 'None', r'statistic\(\) as int32 \[3, ...\], not None'),
    ('UPDATE', 'state["bias_LE"]', r'update\(\) as a dict of bias_LE, more_LEX, not '),
    ('UPDATE', '{"bias_LE": state["bias_LE"]}', r'update\(\) as a dict of bias_LE, more_LEX, not one of bias_LE'),
    ('UPDATE', '{**state, "bias_LE": gamma * load_LE.sum(-1, keepdims=True)}', r'\[2, 3\], not float32 \[2, 1\]'),
    ('UPDATE', '{**state, "more_LEX": load_LE}', r"update\(\)\['more_LEX'\] as int8 \[2, 3, 7\], not int32 \[2, 3\]"),
    ('UPDATE', '{**state, "bias_LE": load_LE}', r'as float32 \[2, 3\], not int32 \[2, 3\]'),
    ('UPDATE', 'state + 1', r"--plugins = '.*mine.py', line 13: TypeError: unsupported operand"),
    (
      'DIRECTION',
      'load_LE.sum(-1, keepdims=True)',
      r"'pointing' .*direction\(\) as an array \[2, 3\], not int32 \[2, 1\]",
    ),
    ('DIRECTION', '1.0', r'direction\(\) as an array \[2, 3\], not 1.0'),
    ('DIRECTION', 'load_LE @ load_LE', r"--plugins = '.*mine.py', line 17: TypeError: dot_general requires"),
    ('DISPATCHED', 'x_TD[:1]', r"dispatcher 'bad' of --plugins=.* y_TD as float32 \[5, 4\], not float32 \[1, 4\]"),
    ('DISPATCHED', 'None', r'y_TD as float32 \[5, 4\], not None'),
    ('DISPATCHED', 'x_TD.astype(jnp.bfloat16)', r'not bfloat16 \[5, 4\]'),
    ('DISPATCHED', '1 / 0', r"--plugins = '.*mine.py', line 21: ZeroDivisionError"),
    ('MULTIPLIED', 'x_MD[:, :1]', r"matmul 'bad' of --plugins=.* y_MF as float32 \[5, 6\], not float32 \[5, 1\]"),
    ('MULTIPLIED', 'x_MD @ w_eDF[0][:, :len(x_MD) % 5]', r'y_MF as float32 \[5, 6\], not float32 \[5, 0\]'),
  ],
)
def test_entries_that_give_something_else(loaded, word, code, message):
  loaded(entries(**{word: code}))
  with pytest.raises(UserError, match=message) as caught, plugins.blamed():
    jax.jit(lambda: asked())()  # of a function that nothing was compiled of yet
  assert '\n' not in str(caught.value)


def test_other_errors_are_no_plugins_fault(loaded):
  loaded(METRIC)
  with pytest.raises(ZeroDivisionError), plugins.blamed():
    1 / 0  # noqa: B018
  with pytest.raises(BrokenPipeError), plugins.blamed():
    raise BrokenPipeError


ATTENTION = """
from moe.inference.attention import CachedAttention
from moe.registry import CACHED_ATTENTIONS, ATTENTIONS
from moe.model.attention import Attention

class Narrow(Attention):
  module = parameters = cache = None

class Cached(CachedAttention):
  weights = None
  def attend(self, w, cache, x_TD, chunk, model):
    return ATTENDED

ATTENTIONS.add('narrow', Narrow())
CACHED_ATTENTIONS.add('narrow', Cached())
"""
NARROW = ModelConfig(attention='narrow')


def on_one_device(run, *arrays):
  mesh = jax.make_mesh((1,), ('tensor',), (AxisType.Auto,))
  return jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P()), *arrays)


def test_attention_that_would_be_broadcast(loaded):
  loaded(ATTENTION)
  layer = SimpleNamespace(scale_attention_D=jnp.ones(D), eps=1e-6, attention=lambda x_BSD, *_: x_BSD[..., :1])
  block = lambda x_BSD: attention_block(layer, x_BSD, None, Config(model=NARROW))
  message = r"attention 'narrow' of --plugins=.*mine.py must give y_BSD as float32 \[1, 5, 4\], not float32 \[1, 5, 1\]"
  with pytest.raises(UserError, match=message):
    on_one_device(block, jnp.ones((1, T, D)))


@pytest.mark.parametrize(
  ('attended', 'message'),
  [
    ('x_TD, cache', r'attend\(\)\[0\] as an array \[P, 5, 4\], not float32 \[5, 4\]'),
    ('x_TD[None, :, :1], cache', r'attend\(\)\[0\] as an array \[P, 5, 4\], not float32 \[1, 5, 1\]'),
    ('x_TD[None], {}', r'attend\(\)\[1\] as a dict of key_R, not '),
    ('x_TD[None], {"key_R": x_TD}', r"attend\(\)\[1\]\['key_R'\] as float32 \[1, 9, 4\], not float32 \[5, 4\]"),
    ('x_TD', r'attend\(\) as parts and a cache'),
  ],
)
def test_attention_over_a_cache_that_would_be_broadcast(loaded, attended, message):
  loaded(ATTENTION.replace('ATTENDED', attended))
  w = {'scale_attention_D': jnp.ones(D), 'attention': {}}
  run = lambda x_TD, cache: forward.layer(w, cache, Stream(x_TD), None, Resolved(model=NARROW))
  with pytest.raises(UserError, match=f"attention in generation 'narrow' .*{message}"):
    on_one_device(run, jnp.ones((T, D)), {'key_R': jnp.ones((1, 9, D))})
