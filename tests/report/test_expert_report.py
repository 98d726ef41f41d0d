"""The part of a run's page that is about its experts: what it shows, of which runs, and what it does not believe."""

import json
import re

import numpy as np
import pytest
from fake_run import read_jsonl, write_json, write_jsonl, write_run

from moe.balance import load_history
from moe.balance.experts_file import FILE
from moe.errors import UserError
from moe.files import write_json as sealed
from moe.report import expert_figures as drawn
from moe.report import routing
from moe.report.experts import Text
from moe.report.html import write_report
from moe.report.run import load_run, summarize

L, E, K, STEPS = 5, 16, 4, 60
SOURCES = ['.py', 'a$b_<i>', '.md']
TEXTS = ['', 'def', ' ', 'f<b>', '\n', '\x00', 'ä']
NAMES = ['layer 1', 'layer 2', 'layer 3', 'layer 4', 'MTP 0']


def experts_json(step=STEPS):
  rng = np.random.default_rng(0)
  expert_LTK = rng.permuted(np.broadcast_to(np.arange(E), (L, len(TEXTS), E)), axis=-1)[..., :K]
  expert_LTK[-1, -1] = -1
  weight_LTK = rng.integers(1, 9999, (L, len(TEXTS), K))
  text = {'token_ids': list(range(len(TEXTS))), 'texts': TEXTS}
  text |= {'expert_plus_1': load_history.encode(expert_LTK.reshape(-1, K) + 1)}
  text |= {'weight': load_history.encode(weight_LTK.reshape(-1, K))}
  bits = {'information_bits': [1.5] * L, 'information_bias_bits': [0.25] * L, 'expert_bits': [3.5] * L}
  found = {'step': step, 'set': 'full', 'by': 'suffix', 'sources': SOURCES, 'text': text} | bits
  load = rng.integers(1, 900, (len(SOURCES) * L, E))
  return found | {'load_SLE': load_history.encode(load), 'token_kinds': 37, 'routed_of_kinds': 0.875}


def with_experts(path):
  """A run that says what its experts did, its dead ones, biases and losses by source and of MTP modules."""
  write_run(path, steps=STEPS, history_every=5)
  sealed(path / FILE, experts_json())
  rows = read_jsonl(path / 'load_history.jsonl')
  for row in rows:
    row['load_LE'][2][:3] = [0, 0, 0]
  lines = [load_history.line(row['step'], row['load_LE'], np.full((L, E), 0.01 * row['step'])) for row in rows[::2]]
  lines += [load_history.line(row['step'], row['load_LE']) for row in rows[1::2]]
  lines.sort(key=lambda line: json.loads(line)['step'])
  (path / 'load_history.jsonl').write_text('\n'.join([*lines, '']))
  evals = read_jsonl(path / 'evals.jsonl')
  for row in evals:
    row |= {
      'specialisation_bits': [0.01 * row['step']] * L,
      'source_loss': dict(zip(SOURCES, [3.0, 2.0, 1.0], strict=True)),
    }
    row |= {'val_mtp_loss': 1.5, 'top_share_global': 0.375}
  write_jsonl(path / 'evals.jsonl', evals)
  rows = [row | {'mtp_loss': 2.0, 'top_share_batch': 0.5} for row in read_jsonl(path / 'metrics.jsonl')]
  write_jsonl(path / 'metrics.jsonl', rows)
  return path


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  return with_experts(tmp_path_factory.mktemp('experts') / 'run')


@pytest.fixture(scope='module')
def run(run_dir):
  return load_run(run_dir)


@pytest.fixture(scope='module')
def page(run_dir):
  write_report(run_dir)
  return (run_dir / 'report.html').read_text()


def test_every_section_is_there(page):
  wanted = ['Measures of balance', 'Dead experts', 'Router bias by expert', 'Routing of a text', 'Specialisation']
  wanted += ['Load by source', 'Validation loss by source', 'Throughput']
  titles = re.findall('<h2>(.*)</h2>', page)
  first = titles.index(wanted[0])
  assert titles[first : first + len(wanted)] == wanted
  assert not re.search('was not logged|were not logged|of one source', page)
  assert '37 token ids are told apart, which 88% of the choices are for' in page
  for title in ('Gradient norm by group', 'MTP loss', 'load Gini', 'top_share'):
    assert f'<figcaption>{title}</figcaption>' in page


def test_the_text_of_the_page_is_escaped(page):
  assert '<b>' not in page
  assert 'f&lt;b&gt;</span>' in page
  assert '\x00' not in page
  assert '<script' not in page
  assert 'http://' not in page.replace('http://www.w3.org', '')


def test_tokens_are_shown_with_their_experts():
  expert_LTK = np.array([[[3, 1], [2, 0], [-1, -1]], [[0, 1], [0, 1], [0, 1]]])
  weight_LTK = np.array([[[0.25, 0.75], [0.5, 0.5], [0, 0]], [[1.0, 0.0]] * 3])
  html = routing.routed_text(Text([7, 8, 9], ['a"', '', '\t\n'], expert_LTK, weight_LTK), ['layer 1', 'MTP 0'])
  shown = re.search('<div id="text0"><pre>(.*?)</pre>', html, re.DOTALL)[1]
  assert shown == (
    f'<span style="background:{routing.color(1)}" title="token 7: expert 1 (0.75), expert 3 (0.25)">a&quot;</span>'
    f'<span style="background:{routing.color(2)}" title="token 8: expert 2 (0.50), expert 0 (0.50)">·</span>'
    '<span class="none" title="token 9: not routed">→\t↵\n</span>'
  )
  assert re.findall('<label for="layer(.)">(.*?)</label>', html) == [('0', 'layer 1'), ('1', 'MTP 0')]
  assert html.count(' checked>') == 1
  assert 'expert 0 · 100%' in html.split('id="text1"')[1]
  assert 'expert 1 · 50%' in html.split('id="text0"')[1]


def test_colors_of_experts_differ():
  assert len({routing.color(expert) for expert in range(64)}) == 64


@pytest.mark.parametrize(('count', 'most', 'expected'), [(3, 6, [0, 1, 2]), (61, 4, [0, 20, 40, 60]), (1, 5, [0])])
def test_layers_are_spread(count, most, expected):
  assert routing.spread(count, most) == expected


def test_dead_experts_are_counted(run):
  steps, dead_NL = run.layer_curves('dead_experts')
  assert steps.tolist() == [1, *range(5, STEPS + 1, 5)]
  assert (dead_NL == [0, 0, 3, 0, 0]).all()
  figure = drawn.dead_experts(run)
  bold = [line for line in figure.axes[0].lines if line.get_label() == 'layer 3']
  np.testing.assert_allclose(bold[0].get_ydata(), 3)


def test_biases_are_those_that_were_logged(run):
  assert [row['step'] for row in run.biases] == [1, 10, 20, 30, 40, 50, 60]
  assert (run.biases[-1]['bias_LE'] == np.float32(0.6)).all()
  assert [title for title, _ in drawn.bias_maps(run)] == NAMES


def test_loads_by_source(run):
  titles, found = zip(*drawn.source_loads(run, run.experts), strict=True)
  assert list(titles) == NAMES
  shown = found[1].axes[0].images[0].get_array()
  load_SE = run.experts.load_SLE[:, 1]
  load_SE = np.concatenate([load_SE.sum(0, keepdims=True), load_SE])
  np.testing.assert_allclose(shown, load_SE / load_SE.mean(1, keepdims=True))
  assert [label.get_text() for label in found[1].axes[0].get_yticklabels()] == ['all text', '.py', r'a\$b_<i>', '.md']


def test_bars_are_corrected(run):
  axes = drawn.specialisation(run, run.experts).axes[0]
  assert [bar.get_height() for bar in axes.patches] == [1.25] * L
  over_time = drawn.specialisation_over_time(run).axes[0]
  np.testing.assert_allclose(over_time.lines[0].get_ydata(), [0.2, 0.4, 0.6])


def test_losses_of_sources(run):
  lines = drawn.source_loss(run).axes[0].lines
  assert {line.get_label(): line.get_ydata()[-1] for line in lines} == {'.py': 3, r'a\$b_<i>': 2, '.md': 1}


def test_metrics_that_only_the_log_knows_are_shown(run, page):
  assert summarize(run)['top_share_global'] == 0.375
  assert 'top_share, global' in page


def test_metrics_of_a_plugin_that_is_not_here(run_dir, tmp_path):
  info = json.loads((run_dir / 'config.json').read_text())
  plugin = {'kind': 'metric', 'name': 'top_share', 'file': '/mine/<x>.py'}
  copy = with_experts(tmp_path / 'run')
  write_json(copy / 'config.json', info | {'plugins': [plugin]})
  line = "the metric 'top_share' of a plugin; give --plugins=/mine/<x>.py again"
  assert write_report(copy)['missing_plugins'] == [line]
  assert 'give --plugins=/mine/&lt;x&gt;.py again' in (copy / 'report.html').read_text()


def test_a_run_that_does_not_say(tmp_path):
  path = write_run(tmp_path / 'old')
  assert load_run(path).experts is None
  write_report(path)
  page = (path / 'report.html').read_text()
  assert 'Which text experts get was not logged' in page
  assert 'The bias of each expert was not logged' in page


def change(**changes):
  return lambda found: found | changes


@pytest.mark.parametrize(
  'spoil',
  [
    change(load_SLE=load_history.encode(np.zeros((3, 2)))),
    change(sources=['.py']),
    change(sources=[1, 2, 3]),
    change(sources='abc'),
    change(step='x'),
    change(by=None),
    change(information_bits=[1.0]),
    change(information_bits=[float('1e999')] * L),
    change(token_kinds=2.5),
    change(text={'token_ids': [1], 'texts': []}),
    change(text=[1]),
    lambda found: found | {'text': found['text'] | {'expert_plus_1': 'AAAA'}},
    lambda found: found | {'text': found['text'] | {'weight': 5}},
    lambda found: {key: value for key, value in found.items() if key != 'by'},
  ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path, spoil):
  path = write_run(tmp_path / 'run', steps=6, history_every=3)
  write_json(path / FILE, spoil(experts_json()))
  with pytest.raises(UserError, match=r'experts\.json') as caught:
    load_run(path)
  assert '\n' not in str(caught.value)


def test_a_file_that_was_changed_is_refused(tmp_path):
  path = write_run(tmp_path / 'run', steps=6, history_every=3)
  sealed(path / FILE, experts_json())
  (path / FILE).write_text((path / FILE).read_text().replace('"suffix"', '"folder"'))
  with pytest.raises(UserError, match='its CRC-32 differs'):
    load_run(path)


@pytest.mark.parametrize('value', ['x', [1], {'a': 'x'}, None, 5, {'.py': None, '.md': True}])
def test_values_of_another_kind_count_as_not_measured(tmp_path, value):
  path = with_experts(tmp_path / 'run')
  evals = [row | {'source_loss': value, 'specialisation_bits': value} for row in read_jsonl(path / 'evals.jsonl')]
  write_jsonl(path / 'evals.jsonl', evals)
  run = load_run(path)
  assert drawn.specialisation_over_time(run) is None
  drawn.source_loss(run)


def test_labels_can_be_drawn():
  assert drawn.label('a$b\n\u4e2d') == r'a\$b??'
  assert drawn.label('_' * 3 + 'x' * 40) == '..' + 'x' * 18
