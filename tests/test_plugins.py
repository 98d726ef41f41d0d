"""Files of users that add to the registries: what they add, what a run remembers of them, their mistakes."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe import plugins
from moe.balance import metrics, rules
from moe.config import Config, from_config_dict, to_config_dict
from moe.errors import UserError
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
    ('x = (', r'SyntaxError.*line 1'),
    ('x = 1\nx += y', r'line 2: NameError'),
    ('import nowhere', r'line 1: ModuleNotFoundError'),
    (METRIC + METRIC, r"line 12: ValueError: there is a metric 'top_share' already"),
    (METRIC.replace('def top_share', 'def TopShare'), r"line 5: ValueError: metric 'TopShare' must be called by small"),
    (
      'from moe.registry import BIAS_RULES\nBIAS_RULES.add("sign", 5)',
      "line 2.*there is a bias rule 'sign' already",
    ),
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
    ('0.5', r"metric 'broken' must give a finite number for each of 2 layers, not 0.5"),
    ('[1, float("nan")]', 'must give a finite number'),
    ('"text"', 'ValueError'),
  ],
)
def test_metrics_that_do_not_measure(loaded, body, message):
  loaded(f'from moe.balance.metrics import metric\n@metric("x")\ndef broken(load_LE):\n  return {body}')
  with pytest.raises(UserError, match=message):
    metrics.measured([[3, 1], [2, 2]], 'batch')
