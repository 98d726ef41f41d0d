"""Reports of sweeps, from results folders made by formulas."""

import csv
import json
import math
import pathlib
import re
import shutil

import fake_sweep
import numpy as np
import pytest
from scipy import stats

from moe.balance import metrics
from moe.errors import UserError
from moe.report import imbalance, sweep_figures, sweep_html
from moe.report.document import image
from moe.report.results import Spread, load_results, unfair
from moe.report.run import load_run
from moe.report.sweep import write_sweep_report
from moe.sweep import manifest


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """4 variants x 3 seeds, all finished; not to be changed."""
  path = tmp_path_factory.mktemp('sweep') / 'whole'
  fake_sweep.make(path)
  return path


@pytest.fixture(scope='module')
def table_text(whole):
  """What reporting `whole` prints; its report and tables lie in the folder then."""
  return write_sweep_report(whole)


@pytest.fixture
def sweep(whole, tmp_path):
  """A copy that a test may change."""
  return pathlib.Path(shutil.copytree(whole, tmp_path / 'copy'))


def rows(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def last_eval(path, variant, seed):
  return json.loads((path / f'{variant},seed={seed}' / 'evals.jsonl').read_text().splitlines()[-1])


def test_table_is_mean_and_spread_over_seeds(whole, table_text):
  table = {row['variant']: row for row in rows(whole / 'table.csv')}
  assert list(table) == list(fake_sweep.VARIANTS)
  for variant, row in table.items():
    evals = [last_eval(whole, variant, seed) for seed in range(3)]
    nats = [row['val_loss'] for row in evals]
    vio = []
    for result in evals:
      load_LE = np.array(result['load_LE'], float)
      vio.append(np.mean([layer.max() / layer.mean() - 1 for layer in load_LE]))
    for key, values in (('val_loss', nats), ('max_vio_global', vio)):
      assert float(row[f'{key}_mean']) == pytest.approx(sum(values) / 3, rel=1e-12)
      deviation = math.sqrt(sum((value - sum(values) / 3) ** 2 for value in values) / 2)
      assert float(row[f'{key}_std']) == pytest.approx(deviation, rel=1e-9)
    assert row['finished_seeds'] == '3'
    assert variant in table_text
  for picture in ('pareto.png', 'max_vio.png'):
    assert (whole / picture).read_bytes().startswith(b'\x89PNG')
  runs = rows(whole / 'runs.csv')
  assert len(runs) == 12
  assert {(run['variant'], run['seed'], run['finished']) for run in runs} >= {('none', '2', 'True')}


def test_differences_are_paired_over_seeds(whole):
  found = load_results(whole).against_baseline('val_loss')
  p_values = []
  for variant, gap in found.items():
    base, other = ([last_eval(whole, name, seed)['val_loss'] for seed in range(3)] for name in ('sign', variant))
    expected = stats.ttest_rel(other, base)
    low, high = expected.confidence_interval(0.95)
    assert (gap.seeds, gap.mean) == (3, pytest.approx(np.mean(other) - np.mean(base)))
    assert (gap.low, gap.high) == (pytest.approx(low), pytest.approx(high))
    p_values.append(expected.pvalue)
  smallest = min(p_values)
  assert min(gap.p for gap in found.values()) == pytest.approx(3 * smallest)  # Holm: the smallest of three


def test_step_time_by_hand(monkeypatch):
  monkeypatch.setattr(imbalance, 'FLOPS_PER_S', 1000.0)
  monkeypatch.setattr(imbalance, 'LINK_BYTES_PER_S', 10.0)
  load_LE = np.array([[30, 10, 20, 20], [20, 20, 20, 20]])
  # D 5, F 2, K 2: 40 tokens. A copy: 180 FLOPs, 0.18 s; 8 * 5 * 1/2 = 20 bytes, 2 s.
  real_s, even_s = imbalance.step_s(load_LE, 2, 5000.0, 5, 2, 2)
  other_s = (40 * 5000 - 160 * 180) / 2 / 1000
  assert even_s == pytest.approx(other_s + 80 * 2.18)
  assert real_s == pytest.approx(other_s + 80 * 2.18)  # two devices have 40 copies each
  real_s, _ = imbalance.step_s(load_LE, 4, 5000.0, 5, 2, 2)
  assert real_s == pytest.approx(other_s / 2 + (30 + 20) * (0.18 + 3))
  # Capacity 1.25 * 20 = 25: 5 of the 30 are dropped, so the two devices of the first layer have 35 and 40 copies.
  real_s, even_s = imbalance.step_s(load_LE, 2, 5000.0, 5, 2, 2, capacity_factor=1.25)
  assert real_s == even_s == pytest.approx(other_s + 80 * 2.18)
  real_s, _ = imbalance.step_s(load_LE, 4, 5000.0, 5, 2, 2, capacity_factor=1.25)
  assert real_s == pytest.approx(other_s / 2 + (25 + 20) * (0.18 + 3))


def test_throughput_falls_with_imbalance_and_devices(whole):
  even, skewed = (load_run(whole / f'{name},seed=0') for name in ('sign', 'none'))
  assert imbalance.device_counts(16) == [4, 8, 16]
  assert imbalance.device_counts(64) == [16, 32, 64]
  assert imbalance.device_counts(6) == [2]
  assert imbalance.device_counts(7) == []
  for run in (even, skewed):
    speeds = [imbalance.relative_throughput(run, devices) for devices in (1, 4, 8, 16)]
    assert speeds[0] == 1
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[3] < 1
  assert imbalance.relative_throughput(skewed, 16) < imbalance.relative_throughput(even, 16)


@pytest.mark.usefixtures('table_text')
def test_page_shows_everything_and_is_self_contained(whole):
  page = (whole / 'report.html').read_text()
  sections = ['Results', 'Quality against balance', 'Against sign', 'What imbalance costs', 'Balance over training']
  sections += ['Training loss', 'Load by layer and expert', 'Fairness', 'Set-up']
  assert re.findall('<h2>(.*?)</h2>', page) == sections
  assert page.count('<img') == 7
  assert '12 of 12 runs finished' in page
  assert 'Lowest validation loss: none' in page
  assert 'Checked: all finished runs had the same text' in page
  assert not re.search('https?://|<script|(src|href)="(?!data:)|@import', page)


@pytest.mark.parametrize(
  ('spread', 'text'),
  [
    ((2.13456, 0.0123), '2.135 ± 0.012'),
    ((2.13456, None), '2.135'),
    ((12345.6, 78.9), '12,346 ± 79'),
    ((2.0, 0.0), '2 ± 0'),
    ((0.5, 0.25), '0.50 ± 0.25'),
  ],
)
def test_spreads_have_as_many_decimals_as_they_deserve(spread, text):
  assert sweep_html.spread_text(Spread(*spread)) == text


def test_figures_are_the_same_each_time(whole):
  results = load_results(whole)
  for figure in (sweep_figures.pareto, sweep_figures.heat_maps):
    assert image('x', figure(results)) == image('x', figure(results))


def test_pareto_front_by_hand():
  assert sweep_figures._front([(3, 1), (1, 3), (2, 2), (2.5, 2.5), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]


def test_partial_sweep(sweep):
  """One variant never started, one run in its middle, one failed: the rest is reported."""
  for seed in range(3):
    shutil.rmtree(sweep / f'switch_0.01,seed={seed}')
  cut = sweep / 'none,seed=1'
  (cut / 'evals.jsonl').unlink()
  (cut / 'metrics.jsonl').write_text(''.join((cut / 'metrics.jsonl').read_text().splitlines(True)[:20]))
  failed = sweep / 'switch_0.001,seed=2'
  shutil.rmtree(failed)
  failed.mkdir()
  (failed / 'log.txt').write_text('$ python train.py\nerror: no text\n')
  write_sweep_report(sweep)
  results = load_results(sweep)
  assert results.variants == ['sign', 'none', 'switch_0.001']
  assert [len(results.of(name)) for name in results.variants] == [3, 2, 2]
  assert dict(results.missing) == {
    'none,seed=1': 'step 20 of 40',
    'switch_0.001,seed=2': 'error: no text',
    **{f'switch_0.01,seed={seed}': 'not started' for seed in range(3)},
  }
  table = {row['variant']: row for row in rows(sweep / 'table.csv')}
  nats = [last_eval(sweep, 'none', seed)['val_loss'] for seed in (0, 2)]
  assert float(table['none']['val_loss_mean']) == pytest.approx(np.mean(nats))
  assert results.against_baseline('val_loss')['none'].seeds == 2
  page = (sweep / 'report.html').read_text()
  assert '7 of 12 runs finished' in page
  assert 'none,seed=1: step 20 of 40' in page


def test_a_seed_that_has_just_begun_does_not_cut_the_curves_of_the_others(sweep):
  run = sweep / 'none,seed=1'
  (run / 'evals.jsonl').unlink()
  (run / 'metrics.jsonl').write_text(''.join((run / 'metrics.jsonl').read_text().splitlines(True)[:2]))
  axes = sweep_figures.loss(load_results(sweep)).axes[0]
  assert {line.get_label(): line.get_xdata()[-1] for line in axes.lines} == dict.fromkeys(fake_sweep.VARIANTS, 40)


def test_a_baseline_that_has_just_begun_does_not_cut_the_gaps_of_the_others(sweep):
  run = sweep / 'sign,seed=1'
  (run / 'evals.jsonl').unlink()
  (run / 'metrics.jsonl').write_text(''.join((run / 'metrics.jsonl').read_text().splitlines(True)[:2]))
  axes = sweep_figures.loss_gap(load_results(sweep)).axes[0]
  others = [line for line in axes.lines if line.get_label() in fake_sweep.VARIANTS]
  assert [line.get_xdata()[-1] for line in others] == [40] * 3


@pytest.mark.usefixtures('words_only')
@pytest.mark.parametrize(
  ('name', 'text', 'why'),
  [('metrics.jsonl', 'garbage\n{}\n', 'line 1 is no valid JSON'), ('config.json', '', 'config.json is no valid JSON')],
)
def test_a_damaged_run_is_listed_and_the_rest_reported(sweep, name, text, why):
  path = sweep / 'none,seed=1' / name
  path.write_text(text + (path.read_text() if text else ''))
  write_sweep_report(sweep)
  results = load_results(sweep)
  assert len(results.of('none')) == 2
  assert [folder for folder, _ in results.missing] == ['none,seed=1']
  assert why in results.missing[0][1]
  assert 'none,seed=1: cannot be read' in (sweep / 'report.html').read_text()


def test_only_variants_with_the_most_seeds_are_ranked(sweep):
  """'none' has the lowest loss, by one seed; of the three with all seeds, 'sign'."""
  for seed in (1, 2):
    shutil.rmtree(sweep / f'none,seed={seed}')
  results = load_results(sweep)
  assert results.ranked == ['sign', 'switch_0.001', 'switch_0.01']
  assert min(results.variants, key=lambda v: results.spread(v, 'val_loss').mean) == 'none'
  assert sweep_html.verdict(results).startswith('Lowest validation loss: sign')
  assert sweep_html.verdict(results).endswith('(of the 3 variants with 3 seeds).')
  labels = sweep_figures.pareto(results).axes[0].get_legend_handles_labels()[1]
  assert {'sign, 3 seeds', 'none, 1 seed'} < set(labels)


@pytest.mark.usefixtures('words_only')
def test_a_variant_with_one_bad_seed_is_not_worse_for_it(sweep):
  """Seed 1 is worse by 0.5 for all; 'none' has that seed only, and is still the best, as it is with three."""
  for variant in fake_sweep.VARIANTS:
    worse = lambda row: row | {key: row[key] + 0.5 for key in ('val_loss', 'val_perplexity')}
    change_rows(sweep / f'{variant},seed=1' / 'evals.jsonl', worse)
  before = load_results(sweep).adjusted('val_loss')
  for seed in (0, 2):
    shutil.rmtree(sweep / f'none,seed={seed}')
  results = load_results(sweep)
  after = results.adjusted('val_loss')
  assert results.spread('none', 'val_loss').mean > results.spread('switch_0.01', 'val_loss').mean + 0.2
  assert after['none'].mean == pytest.approx(before['none'].mean, abs=0.003)  # what is the run's own is 0.001
  assert after['none'].gap == pytest.approx(-0.01, abs=0.003)
  heights = {
    line.get_label(): line.lines[0].get_ydata()[0] for line in sweep_figures.pareto(results).axes[0].containers
  }
  assert min(heights, key=heights.get) == 'none, 1 seed'
  write_sweep_report(sweep)
  table = {row['variant']: row for row in rows(sweep / 'table.csv')}
  assert float(table['none']['val_loss_adjusted_gap']) == after['none'].gap
  assert sweep_html.adjusted_text(after['none']) in (sweep / 'report.html').read_text()


def test_intervals_of_few_seeds_do_not_hide_the_others(sweep):
  """The picture holds all marks and the intervals of three seeds; that of two seeds leaves it on both sides."""
  shutil.rmtree(sweep / 'none,seed=2')
  change_rows(sweep / 'none,seed=1' / 'evals.jsonl', lambda row: row | {'val_loss': row['val_loss'] + 0.1})
  results = load_results(sweep)
  left, right = sweep_figures.quality(results).axes[0].get_xlim()
  found = results.against_baseline('val_loss')
  few = found.pop('none')
  assert few.low < left < min(0, *(gap.low for gap in found.values()))
  base, other = results.pairs('none', 'val_loss')
  assert max(gap.high for gap in found.values()) < right
  assert max(np.subtract(other, base)) < right < few.high


def test_a_run_whose_loss_is_not_a_number_is_left_out(sweep):
  for variant in ('sign', 'none'):
    change_rows(sweep / f'{variant},seed=1' / 'evals.jsonl', lambda row: row | {'val_loss': math.nan})
  write_sweep_report(sweep)
  found = load_results(sweep).against_baseline('val_loss')
  assert {variant: gap.seeds for variant, gap in found.items()} == {'none': 2, 'switch_0.001': 2, 'switch_0.01': 2}


def test_one_running_run_is_enough(tmp_path):
  plan = fake_sweep.make(tmp_path, seeds=(0,))
  for run in plan.runs:
    shutil.rmtree(tmp_path / run.folder)
  fake_sweep.write_run(tmp_path / plan.runs[0].folder, plan.runs[0], 0.0, 0.1, steps=3)
  assert write_sweep_report(tmp_path).splitlines()[1].split() == ['sign', '0', '–', '–', '–']
  assert 'No run is finished yet' in (tmp_path / 'report.html').read_text()


def test_a_sweep_without_runs_has_no_report(tmp_path):
  plan = fake_sweep.make(tmp_path, seeds=(0,))
  for run in plan.runs:
    shutil.rmtree(tmp_path / run.folder)
  with pytest.raises(UserError, match='no runs to report: none of its 4 runs has logged a step'):
    write_sweep_report(tmp_path)
  (tmp_path / manifest.FILE).unlink()
  with pytest.raises(UserError, match='is no results folder of a sweep'):
    write_sweep_report(tmp_path)


def change_rows(path, change):
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  fake_sweep.write_jsonl(path, [change(row) for row in lines])


@pytest.mark.parametrize(
  ('spoil', 'problem'),
  [
    (lambda run: (run / 'data.json').write_text('{"digest": "other"}'), 'same text: abc, other'),
    (lambda run: change_rows(run / 'metrics.jsonl', lambda row: row | {'tokens': 5}), 'same training tokens'),
    (lambda run: change_rows(run / 'evals.jsonl', lambda row: row | {'val_tokens': 9}), 'same validation tokens'),
    (
      lambda run: change_rows(run / 'metrics.jsonl', lambda row: row | {'loss': row['loss'] * 1.001}),
      'the first losses of seed 1 differ',
    ),
  ],
)
def test_an_unfair_comparison_is_said_so(sweep, spoil, problem):
  assert unfair(load_results(sweep)) == []
  spoil(sweep / 'none,seed=1')
  results = load_results(sweep)
  assert problem in ' '.join(unfair(results))
  assert 'NOT FAIR: ' in sweep_html.verdict_on_fairness(results)


def test_balance_measures_are_those_of_the_module(whole):
  member = load_results(whole).of('none')[0]
  load_LE = np.array(last_eval(whole, 'none', 0)['load_LE'])
  assert member.values['max_vio_global'] == pytest.approx(metrics.max_vio(load_LE).mean())
  assert member.values['cv_global'] == pytest.approx((load_LE.std(1) / load_LE.mean(1)).mean())
