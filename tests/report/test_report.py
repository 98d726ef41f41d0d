"""Reports of fake run directories."""

import base64
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import fake_sweep
import numpy as np
import pytest

from moe.balance import metrics
from moe.errors import UserError
from moe.files import read_json
from moe.report import compare, figures, html
from moe.report.html import write_report
from moe.report.run import load_run, summarize

ROOT = pathlib.Path(__file__).parents[2]
BATCH_TOKENS, VAL_TOKENS = 4096, 20000
SECTIONS = ['Loss', 'Balance over training', 'Load by layer and expert', 'Throughput', 'Dropped tokens']
SECTIONS += ['Router health', 'Generated sample', 'Set-up']


def write_run(path, num_layers=5, num_experts=16, top_k=4, steps=300, history_every=10, drops=False):
  """A run whose loss and imbalance decay; returns its path."""
  path.mkdir(parents=True)
  rng = np.random.default_rng(0)
  config = {
    'model': {'num_layers': num_layers, 'num_dense_layers': 1, 'mtp_depth': 1, 'top_k': top_k},
    'balance': {'bias_rule': 'sign', 'gamma': 0.001, 'aux_loss': 'none'},
    'train': {'steps': steps, 'seed': 7},
    'mesh': {'preset': 'local', 'pipe': 0, 'data': 0, 'expert': 2, 'tensor': 0},
  }
  config['model']['num_experts'] = num_experts
  info = {'config': config, 'versions': {'jax': '0.0'}, 'command': 'python train.py --config <x>', 'device': '1 x CPU'}
  write_json(path / 'config.json', info | {'parameters': 1234567, 'active_parameters': 234567})
  data = {'corpus': 'Python <stdlib>', 'tokenizer': 'byte', 'train_bytes': 9000000, 'val_bytes': 20000}
  data |= {'train_tokens': 9000900, 'val_tokens': 20010, 'trigram_bits_per_byte': 2.9, 'gzip_bits_per_byte': 2.2}
  write_json(path / 'data.json', data)
  rows = [metrics_row(step, steps, rng, drops) for step in range(1, steps + 1)]
  write_jsonl(path / 'metrics.jsonl', rows)
  skew_LE = rng.normal(size=(num_layers, num_experts))
  logged = [1, *range(history_every, steps + 1, history_every)]
  history = [{'step': step, 'load_LE': load(skew_LE, step, BATCH_TOKENS * top_k, rng)} for step in logged]
  write_jsonl(path / 'load_history.jsonl', history)
  evals = [evaluation(step, skew_LE, top_k, rng) for step in (steps // 3, 2 * steps // 3, steps)]
  write_jsonl(path / 'evals.jsonl', evals)
  (path / 'sample.txt').write_text('def f(x):\n  return x\n<script>alert("x")</script>\n')
  return path


def metrics_row(step, steps, rng, drops):
  loss = 1.2 + 4.3 * math.exp(-step / 60) + 0.05 * rng.normal()
  rate = 0.1 * math.exp(-step / 100) if drops else 0.0
  return {
    'step': step,
    'loss': loss,
    'total_loss': loss + 0.5,
    'tokens': step * BATCH_TOKENS,
    'tokens_per_s': 900.0 if step == 1 else 41000 + 800 * rng.normal(),
    'step_s': 4.5 if step == 1 else 0.1,
    'learning_rate': 1e-3 * min(step / 50, 1, (steps + 1 - step) / (0.2 * steps)),
    'grad_norm': 0.4 + 2 * math.exp(-step / 30) + 0.1 * rng.random(),
    'grad_norm/router': 0.1,
    'max_vio_batch': 1.5 * math.exp(-step / 70) + 0.06,
    'drop_rate': rate,
    'bias_min': -0.001 * min(step, 80),
    'bias_max': 0.001 * min(step, 60),
    'gate_entropy': 0.95 - 0.3 * step / steps,
  }


def load(skew_LE, step, assignments, rng):
  logits = skew_LE * 0.8 * math.exp(-step / 70)
  p_LE = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  return rng.multinomial(assignments, p_LE).tolist()


def evaluation(step, skew_LE, top_k, rng):
  nats = 1.25 + 4.3 * math.exp(-step / 60)
  row = {'step': step, 'val_loss': nats, 'val_bits_per_byte': nats / math.log(2), 'val_perplexity': math.exp(nats)}
  return row | {'val_tokens': VAL_TOKENS, 'load_LE': load(skew_LE, step, VAL_TOKENS * top_k, rng)}


def write_json(path, value):
  path.write_text(json.dumps(value))


def write_jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def read_jsonl(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run_dir(tmp_path):
  return write_run(tmp_path / 'fake')


def test_summary_by_hand(run_dir):
  rows = [{'step': step, 'loss': float(step), 'tokens': 10 * step, 'step_s': 0.5} for step in range(1, 31)]
  for row in rows:
    row |= {'tokens_per_s': 100.0 + row['step'], 'max_vio_batch': float(row['step']), 'drop_rate': 0.0}
    row['model_tflop_per_s'] = 2.0 + row['step'] % 2
  write_jsonl(run_dir / 'metrics.jsonl', rows)
  load_LE = [[5000] * 16] * 4 + [[10000] * 8 + [0] * 8]
  values = {'val_loss': 0.5, 'val_bits_per_byte': 0.75, 'val_perplexity': 1.5, 'val_tokens': VAL_TOKENS}
  write_jsonl(run_dir / 'evals.jsonl', [{'step': 30, 'load_LE': load_LE} | values])
  config = json.loads((run_dir / 'config.json').read_text())
  config['config']['train']['steps'] = 30
  write_json(run_dir / 'config.json', config)

  summary = write_report(run_dir)

  floor, _ = metrics.noise_floor(VAL_TOKENS, 16, 4)
  assert summary == {
    'run': 'fake',
    'steps': 30,
    'finished': True,
    'tokens': 300,
    'parameters': 1234567,
    'active_parameters': 234567,
    'train_loss_last_20_rows': 20.5,  # mean of 11..30
    'val_loss': 0.5,
    'val_perplexity': 1.5,
    'val_bits_per_byte': 0.75,
    'trigram_bits_per_byte': 2.9,
    'gzip_bits_per_byte': 2.2,
    'corpus': 'Python <stdlib>',
    'train_bytes': 9000000,
    'val_bytes': 20000,
    'max_vio_global': 0.2,  # four balanced layers, one where half the experts get twice their share
    'max_vio_global_per_layer': [0, 0, 0, 0, 1],
    'max_vio_noise_floor': floor,
    'cv_global': 0.2,
    'load_entropy_global': pytest.approx((4 + math.log(8) / math.log(16)) / 5),
    'max_vio_batch': 29.0,  # mean of 28..30
    'drop_rate': 0.0,
    'tokens_per_s': 115.5,
    'model_tflop_per_s': 2.5,
    'mfu': None,  # as on a device whose peak is not known
    'train_s': 15.0,
    'bias_rule': 'sign',
    'aux_loss': 'none',
    'gamma': 0.001,
    'seed': 7,
    'device': '1 x CPU',
    'mesh': 'local expert=2',
    'versions': {'jax': '0.0'},
  }
  assert read_json(run_dir / 'summary.json') == summary
  assert not list(run_dir.glob('*.tmp')) + list(run_dir.glob('.*'))


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  path = write_run(tmp_path_factory.mktemp('page') / 'fake')
  write_report(path)
  return (path / 'report.html').read_text()


def test_page_has_every_section(page):
  assert re.findall('<h2>(.*)</h2>', page) == SECTIONS
  assert page.count('<figure>') == 1 + 1 + 4 + 1 + 4  # loss, MaxVio, heat maps, throughput, health
  assert 'No token was dropped' in page
  assert page.index('bits per byte on validation text') < page.index('<h2>')
  assert 'of random balanced routing.' in page


def test_page_is_self_contained(page):
  assert 'http://' not in page
  assert 'https://' not in page
  assert not re.search('(src|href)="(?!data:)|@import|url\\(|<link', page)
  for image in re.findall('src="data:image/svg\\+xml;base64,([^"]*)"', page):
    assert not re.search('href="(?!#|data:)', base64.b64decode(image).decode())


def test_everything_from_the_run_is_escaped(page):
  assert '<script' not in page
  assert '&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;' in page
  assert 'Python &lt;stdlib&gt;' in page
  assert '--config &lt;x&gt;' in page


def test_numbers_that_puzzle_are_explained(run_dir, page):
  """Where they stand, and only there: the fake run beats gzip and logs no MTP loss."""
  more, mtp = 'More than gzip is usual after a short training', 'The loss of an MTP module may lie below'
  assert more not in page
  assert mtp not in page
  evals = read_jsonl(run_dir / 'evals.jsonl')
  worse = [row | {'val_bits_per_byte': 3.4, 'val_mtp_loss': 1.625} for row in evals]
  write_jsonl(run_dir / 'evals.jsonl', worse)
  write_report(run_dir)
  page = (run_dir / 'report.html').read_text()
  assert page.index('55% more than gzip') < page.index(more) < page.index(mtp) < page.index('<h2>')
  assert 'validation loss of MTP modules' in page
  assert '1.625' in page


def test_mfu_is_shown_where_it_is_known(run_dir, page):
  assert 'MFU' not in page
  rows = read_jsonl(run_dir / 'metrics.jsonl')
  write_jsonl(run_dir / 'metrics.jsonl', [row | {'mfu': 0.281, 'model_tflop_per_s': 278.0} for row in rows])
  assert write_report(run_dir)['mfu'] == 0.281
  page = (run_dir / 'report.html').read_text()
  assert '28.1%' in page
  assert '278' in page


def test_figures_are_reproducible(run_dir):
  run = load_run(run_dir)
  assert figures.to_svg(figures.max_vio(run)) == figures.to_svg(figures.max_vio(run))


def test_interrupted_run(run_dir):
  for name in ('evals.jsonl', 'sample.txt', 'load_history.jsonl', 'data.json'):
    (run_dir / name).unlink()
  write_jsonl(run_dir / 'metrics.jsonl', [{'step': 1, 'loss': 5.5}])
  summary = write_report(run_dir)
  assert summary['finished'] is False
  unknown = {'corpus', 'tokens', 'val_loss', 'max_vio_global', 'max_vio_noise_floor', 'drop_rate', 'train_s'}
  assert unknown <= {key for key, value in summary.items() if value is None}
  page = (run_dir / 'report.html').read_text()
  assert 'Not evaluated' in page
  assert page.count('<figure>') == 1
  assert re.findall('<h2>(.*)</h2>', page) == SECTIONS


def sampled(run_dir, finished=True):
  """The run with evaluations of a sample on the way, 0.5 nats above those of all of the text."""
  *way, end = read_jsonl(run_dir / 'evals.jsonl')
  sample = {'val_loss': end['val_loss'] + 0.5, 'val_bits_per_byte': end['val_bits_per_byte'] + 0.5 / math.log(2)}
  way = [row | {'set': 'sample'} for row in way]
  write_jsonl(run_dir / 'evals.jsonl', [*way, *([end | {'set': 'full', 'sample': sample}] if finished else [])])
  return [row['val_bits_per_byte'] for row in way] + [sample['val_bits_per_byte']], end['val_bits_per_byte']


def points(figure):
  """{label: values} of the dots of the figure's first axes."""
  return {
    line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines if 'validation' in line.get_label()
  }


def test_the_sample_is_a_curve_and_the_whole_text_a_point_apart(run_dir):
  before = points(figures.loss(load_run(run_dir)))
  assert before.keys() == {'validation'}
  assert len(before['validation']) == 3
  sample, full = sampled(run_dir)
  run = load_run(run_dir)
  assert points(figures.loss(run)) == {'validation, a sample': sample, 'validation, all': [full]}
  summary = write_report(run_dir)
  assert summary['val_bits_per_byte'] == full
  assert 'evaluated_on' not in summary
  assert 'of the same rows of the validation text at every step' in (run_dir / 'report.html').read_text()


def test_a_run_that_was_evaluated_on_a_sample_only_says_so(run_dir):
  sample, _ = sampled(run_dir, finished=False)
  summary = write_report(run_dir)
  assert (summary['evaluated_on'], summary['val_bits_per_byte'], summary['finished']) == ('sample', sample[1], False)
  assert points(figures.loss(load_run(run_dir))) == {'validation, a sample': sample[:2]}
  page = (run_dir / 'report.html').read_text()
  assert 'bits per byte on a sample of the validation text' in page
  assert 'Validation sample, step 200' in page


def test_a_tokenizer_that_loses_text_is_said_beside_the_figure(run_dir):
  write_report(run_dir)
  assert 'than gzip' in (run_dir / 'report.html').read_text()
  write_json(run_dir / 'data.json', json.loads((run_dir / 'data.json').read_text()) | {'tokenizer_loses': 0.97})
  assert write_report(run_dir)['tokenizer_loses'] == 0.97
  page = (run_dir / 'report.html').read_text()
  assert 'The tokenizer loses text (97% of a sample), so the figure compares with no other.' in page
  assert 'than gzip' not in page


def test_diverged_run_is_null_not_nan(run_dir):
  rows = read_jsonl(run_dir / 'metrics.jsonl')
  rows[-1]['loss'] = math.nan
  write_jsonl(run_dir / 'metrics.jsonl', rows)
  evals = read_jsonl(run_dir / 'evals.jsonl')
  evals[-1] |= {'val_loss': math.nan, 'val_perplexity': math.inf, 'val_bits_per_byte': math.nan}
  write_jsonl(run_dir / 'evals.jsonl', evals)
  run = load_run(run_dir)
  summary = summarize(run)
  assert summary['train_loss_last_20_rows'] is summary['val_bits_per_byte'] is summary['val_perplexity'] is None
  json.dumps(summary, allow_nan=False)
  assert len(run.series('loss')[0]) == 299


def test_cut_last_line_is_ignored(run_dir):
  for name in ('metrics.jsonl', 'evals.jsonl', 'load_history.jsonl'):
    with (run_dir / name).open('a') as file:
      file.write('{"step": 301, "loa')
  run = load_run(run_dir)
  assert run.rows[-1]['step'] == run.evals[-1]['step'] == run.load_history[-1]['step'] == 300
  assert summarize(run)['finished'] is True


def test_resumed_run_replaces_later_steps(run_dir):
  with (run_dir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 201, "loss": 9.0}\n{"step": 202, "loss": 9.5}\n')
  rows = load_run(run_dir).rows
  assert [row['step'] for row in rows] == list(range(1, 203))
  assert rows[-1]['loss'] == 9.5


def test_train_s_counts_steps_between_rows(run_dir):
  write_jsonl(run_dir / 'metrics.jsonl', [{'step': step, 'loss': 1.0, 'step_s': 0.5} for step in (10, 20)])
  assert summarize(load_run(run_dir))['train_s'] == 10.0


def test_58_layers_of_256_experts(tmp_path):
  path = write_run(tmp_path / 'v3', num_layers=61, num_experts=256, top_k=8, history_every=20)
  write_report(path)
  assert (path / 'report.html').stat().st_size < 5e6


def bad_line(path):
  lines = (path / 'metrics.jsonl').read_text().splitlines()
  (path / 'metrics.jsonl').write_text('\n'.join([lines[0], lines[1][:20], *lines[2:]]))


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda path: (path / 'config.json').unlink(), 'config.json'),
    (lambda path: (path / 'config.json').write_text('{"config"'), 'config.json is no valid JSON'),
    (lambda path: (path / 'config.json').write_text('{"config": {"model": {}}}'), "no setting 'model.num_layers'"),
    (lambda path: (path / 'metrics.jsonl').unlink(), 'metrics.jsonl'),
    (lambda path: (path / 'metrics.jsonl').write_text(''), 'metrics.jsonl has no rows'),
    (lambda path: (path / 'metrics.jsonl').write_text('{"step": 1}\n'), 'the row of step 1 has no loss'),
    (bad_line, 'metrics.jsonl line 2 is no valid JSON'),
    (
      lambda path: (path / 'evals.jsonl').write_text('{"step": 1, "load_LE": [[1, 2]]}\n'),
      r'step 1: load_LE has shape \(1, 2\)',
    ),
    (lambda path: (path / 'report.html').mkdir(), r'cannot write .*report\.html'),
  ],
)
def test_bad_directories(run_dir, spoil, message):
  spoil(run_dir)
  with pytest.raises(UserError, match=message) as caught:
    write_report(run_dir)
  assert '\n' not in str(caught.value)


def test_no_directory(tmp_path):
  with pytest.raises(UserError, match=r'nowhere is no directory; a run directory holds config\.json'):
    load_run(tmp_path / 'nowhere')


def run_script(*args):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, str(ROOT / 'experiments/report.py'), *map(str, args)]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_script_on_a_run_with_drops(tmp_path):
  path = write_run(tmp_path / 'capacity', drops=True)
  done = run_script(path)
  assert done.returncode == 0, done.stderr
  summary = json.loads(done.stdout)
  assert summary == read_json(path / 'summary.json')
  assert summary['drop_rate'] == pytest.approx(np.mean([0.1 * math.exp(-step / 100) for step in range(271, 301)]))
  assert 'alt="Drop rate by step"' in (path / 'report.html').read_text()


def test_script_reports_sweeps_too(tmp_path):
  fake_sweep.make(tmp_path / 'sweep', seeds=(0,))
  done = run_script(tmp_path / 'sweep')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == f'report: {tmp_path / "sweep/report.html"}'
  assert (tmp_path / 'sweep/report.html').is_file()


def test_script_refuses_a_bad_directory_in_one_line(tmp_path):
  done = run_script(tmp_path / 'nowhere')
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1


# ---------------------------------------------------------------------------------------------------------- two runs


def shifted(path, tmp_path, name, factor, **data):
  """The run of `path` again, with every loss times `factor`."""
  other = write_run(tmp_path / name)
  rows = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  write_jsonl(other / 'metrics.jsonl', [row | {'loss': factor * row['loss']} for row in rows[:-20]])
  write_json(other / 'data.json', json.loads((path / 'data.json').read_text()) | data)
  return other


def test_compare_reports_the_relative_difference_of_common_steps(tmp_path):
  path = write_run(tmp_path / 'one')
  found = compare.compare(load_run(path), load_run(shifted(path, tmp_path, 'two', 1.002)), last=100)
  losses = [json.loads(line)['loss'] for line in (path / 'metrics.jsonl').read_text().splitlines()][180:280]
  assert (found['steps'], found['last']) == (280, 100)
  assert found['mean_difference'] == pytest.approx(0.002) == found['mean_absolute_difference']
  assert found['loss'] == pytest.approx(np.mean(losses))
  assert found['other_loss'] == pytest.approx(1.002 * np.mean(losses))


def test_compare_draws_both_and_is_a_script(tmp_path):
  path = write_run(tmp_path / 'one')
  other = shifted(path, tmp_path, 'two', 0.99)
  command = [sys.executable, ROOT / 'experiments/compare.py', path, other, f'--plot={tmp_path}/two.png']
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(done.stdout)['mean_difference'] == pytest.approx(-0.01)
  assert (tmp_path / 'two.png').read_bytes().startswith(b'\x89PNG')


def test_compare_refuses_what_does_not_compare(tmp_path):
  path = write_run(tmp_path / 'one')
  base = load_run(path)
  with pytest.raises(UserError, match='differ in text'):
    compare.compare(base, load_run(shifted(path, tmp_path, 'two', 1, digest='another')), 10)
  for last in (0, 301):
    with pytest.raises(UserError, match='300 steps in common'):
      compare.compare(base, base, last)


# ------------------------------------------------------------------------------- what disks and editors do to a run


DEEP = '[' * 600 + ']' * 600  # read as JSON, but not to be written again
LARGE = '1' + '0' * 400  # an integer, but no float
VALUES = ('null', '"x"', '[1]', '{"a": 1}', 'true', LARGE, 'NaN', '-1', '1e999', DEEP)


def spoiled(path, name, keys, value):
  """Sets fields of the last line of a file to some JSON text."""
  *lines, last = path.joinpath(name).read_text().splitlines()
  row = json.loads(last)
  for key in keys:
    target, (*sections, field) = row, key.split('.')
    for section in sections:
      target = target[section]
    target[field] = 'PLACE'
  path.joinpath(name).write_text('\n'.join([*lines, json.dumps(row).replace('"PLACE"', value)]) + '\n')


@pytest.fixture
def small(tmp_path):
  return write_run(tmp_path / 'small', num_layers=2, num_experts=4, top_k=2, steps=6, history_every=3)


@pytest.mark.parametrize('value', VALUES, ids=lambda value: value[:8])
def test_measurements_of_another_kind_count_as_not_measured(small, value, monkeypatch):
  rates = ('drop_rate', 'tokens_per_s', 'bias_min', 'bias_max', 'gate_entropy', 'grad_norm', 'learning_rate')
  spoiled(small, 'metrics.jsonl', ('loss', 'tokens', 'step_s', 'max_vio_batch', *rates), value)
  spoiled(small, 'evals.jsonl', ('val_loss', 'val_perplexity', 'val_bits_per_byte'), value)
  spoiled(small, 'data.json', ('corpus', 'train_bytes', 'val_bytes', 'train_tokens', 'gzip_bits_per_byte'), value)
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')  # drawn, but not rendered
  summary = write_report(small)
  json.dumps(summary, allow_nan=False)
  if value not in ('true', '-1'):  # these are numbers
    for key in ('tokens', 'train_loss_last_20_rows', 'val_loss', 'gzip_bits_per_byte', 'train_bytes'):
      assert summary[key] is None


@pytest.mark.parametrize(
  ('name', 'key'),
  [
    *[(name, 'step') for name in ('metrics.jsonl', 'evals.jsonl', 'load_history.jsonl')],
    *[(name, 'load_LE') for name in ('evals.jsonl', 'load_history.jsonl')],
    *[('config.json', f'config.model.{key}') for key in ('num_layers', 'num_experts', 'top_k', 'mtp_depth')],
    *[('config.json', f'config.{key}') for key in ('train.steps', 'balance.bias_rule')],
  ],
)
def test_what_a_report_cannot_do_without_is_refused_by_name(small, name, key):
  whole, fits = (small / name).read_text(), {'config.balance.bias_rule': '"x"', 'config.train.steps': LARGE}

  def read():
    run = load_run(small)
    return summarize(run), list(run.load_history)

  for value in VALUES:
    if value == fits.get(key):
      continue
    spoiled(small, name, [key], value)
    with pytest.raises(UserError, match=rf'{re.escape(name)}|is nested too deeply') as caught:
      read()
    assert '\n' not in str(caught.value)
    (small / name).write_text(whole)


@pytest.mark.parametrize('key', ['parameters', 'versions', 'device', 'command', 'starts', 'config.train.seed'])
def test_what_config_json_says_besides_is_shown_or_refused(small, key, monkeypatch):
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')
  whole = (small / 'config.json').read_text()
  for value in VALUES:
    spoiled(small, 'config.json', [key], value)
    try:
      run = load_run(small)
      summary = summarize(run)
    except UserError:
      assert value in ('NaN', '1e999', DEEP) or key == 'config.train.seed'
    else:
      json.dumps(summary, indent=2, allow_nan=False)
      html.page(run, summary) if value == 'null' else run.holes
    (small / 'config.json').write_text(whole)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'evals.jsonl', 'load_history.jsonl'])
def test_a_damaged_line_is_named(small, name):
  *lines, last = (small / name).read_bytes().splitlines()
  for damage in (b'', b'\0' * 50, b'[1]', b'{}', b'"x"', b'[' * 99_999, b'{"a":' * 99_999, b'\xff\xfe'):
    (small / name).write_bytes(b'\n'.join([*lines, damage, last]) + b'\n')
    with pytest.raises(UserError, match=rf'{re.escape(name)} line {len(lines) + 1} '):
      load_run(small)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'evals.jsonl', 'load_history.jsonl', 'data.json', 'sample.txt'])
def test_only_regular_files_are_read(small, name):
  (small / name).unlink()
  os.mkfifo(small / name)
  with pytest.raises(UserError, match='a pipe or device'):
    load_run(small)


def test_starts_and_missing_rows_are_shown(small, monkeypatch):
  info, hole = json.loads((small / 'config.json').read_text()), 'metrics.jsonl ends at step <5>'
  write_json(small / 'config.json', info | {'starts': [{'step': 0}, {'step': 8, 'holes': [hole, 7]}, 'x']})
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')
  write_report(small)
  page = (small / 'report.html').read_text()
  assert 'Missing rows: metrics.jsonl ends at step &lt;5&gt;.' in page
  assert '&quot;step&quot;: 8' in page
