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
from fake_run import VAL_TOKENS, read_jsonl, write_json, write_jsonl, write_run

from moe.balance import metrics
from moe.files import read_json
from moe.report import figures, html
from moe.report.html import write_report
from moe.report.run import load_run, summarize

ROOT = pathlib.Path(__file__).parents[2]
SECTIONS = ['Loss', 'Balance over training', 'Load by layer and expert', 'Measures of balance', 'Dead experts']
SECTIONS += ['Router bias by expert', 'What experts do', 'Throughput', 'Dropped tokens']
SECTIONS += ['Training health', 'Generated sample', 'Set-up']


@pytest.fixture
def run_dir(tmp_path):
  return write_run(tmp_path / 'fake')


def test_a_run_that_is_killed_while_its_page_is_drawn_is_not_finished(tmp_path, monkeypatch):
  """A sweep that goes on leaves alone what summary.json calls finished."""
  path = write_run(tmp_path / 'run', steps=3, history_every=3)

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(html, 'page', killed)
  with pytest.raises(KeyboardInterrupt):
    write_report(path)
  assert not (path / 'summary.json').exists()


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
  assert page.count('<figure>') == 1 + 1 + 4 + 3 + 1 + 5  # loss, MaxVio, heat maps, measures, throughput, health
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


@pytest.mark.usefixtures('words_only')
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


@pytest.mark.usefixtures('words_only')
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


@pytest.mark.usefixtures('words_only')
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


@pytest.mark.usefixtures('words_only')
def test_a_run_that_was_evaluated_on_a_sample_only_says_so(run_dir):
  sample, _ = sampled(run_dir, finished=False)
  summary = write_report(run_dir)
  assert (summary['evaluated_on'], summary['val_bits_per_byte'], summary['finished']) == ('sample', sample[1], False)
  assert points(figures.loss(load_run(run_dir))) == {'validation, a sample': sample[:2]}
  page = (run_dir / 'report.html').read_text()
  assert 'bits per byte on a sample of the validation text' in page
  assert 'Validation sample, step 200' in page


@pytest.mark.usefixtures('words_only')
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


def run_script(*args):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, str(ROOT / 'experiments/report.py'), *map(str, args)]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


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


@pytest.mark.parametrize(('steps', 'lines', 'marker'), [(2, 1, 'o'), (9, 1, 'None'), (10, 2, 'None')])
def test_a_curve_is_faint_values_and_their_bold_running_mean(steps, lines, marker):
  values = np.arange(steps) % 2.0
  _, axes = figures.panel('y')
  figures.curve(axes, np.arange(steps), values, 'red', 'name', log=True)
  assert len(axes.lines) == lines
  *faint, bold = axes.lines
  mean = figures.running_mean(values) if faint else values
  np.testing.assert_array_equal(bold.get_ydata(), np.where(mean > 0, mean, np.nan))
  for line in faint:
    np.testing.assert_array_equal(line.get_ydata(), np.where(values > 0, values, np.nan))
    assert line.get_alpha() < 0.5
    assert line.get_color() == bold.get_color() == 'red'
  assert (bold.get_marker(), bold.get_label()) == (marker, 'name')
