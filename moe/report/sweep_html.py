"""Lays a sweep out as one self-contained HTML page."""

import math
from html import escape

from moe.report import imbalance, sweep_figures
from moe.report.document import details, document, image, section
from moe.report.paired import Adjusted
from moe.report.results import Results, Spread, metric_names, unfair

SIGNIFICANT = 0.05


def page(results: Results) -> str:
  """The report of a sweep, whole or partial, as an HTML document."""
  sweep = results.sweep
  title = f'Sweep {sweep.name}, scale {sweep.scale}'
  body = [
    f'<h1>{escape(title)}</h1>',
    f'<p class="muted">{escape(_state(results))}</p>',
    f'<p class="verdict">{escape(verdict(results))}</p>',
    section('Results', _RESULTS, _tables(results), ''),
    section(
      'Quality against balance',
      _PARETO,
      image('Validation perplexity by MaxVio_global', sweep_figures.pareto(results), wide=True),
      _NONE_FINISHED,
    ),
    section(
      f'Against {escape(results.baseline)}',
      _SIGNIFICANCE,
      _differences(results) + image('Differences of validation loss', sweep_figures.quality(results), wide=True),
      _NONE_FINISHED,
    ),
    section(
      'What imbalance costs', _COST, image('Modelled speed', sweep_figures.throughput(results), wide=True), _NO_LOADS
    ),
    section(
      'Balance over training', _VIO, image('MaxVio by step', sweep_figures.max_vio(results), wide=True), _NO_LOADS
    ),
    section('Training loss', _LOSS, _images(results), 'No training loss was logged.'),
    section(
      'Load by layer and expert', _HEAT, image('Load maps', sweep_figures.heat_maps(results), wide=True), _NONE_FINISHED
    ),
    '<h2>Fairness</h2>',
    f'<p>{escape(verdict_on_fairness(results))}</p>',
    '<h2>Set-up</h2>',
    details('Not finished', '\n'.join(f'{name}: {why}' for name, why in results.missing) or 'none'),
    details('Variants', {variant.name: dict(variant.overrides) for variant in sweep.variants}),
    details('Settings of every run', _settings(results)),
  ]
  return document(title, body)


def verdict(results: Results) -> str:
  """Which variant is best in loss and in balance, in one line."""
  parts = []
  for key, what in (('val_loss', 'validation loss'), ('max_vio_global', 'MaxVio_global')):
    found = {variant: spread for variant in results.ranked if (spread := results.spread(variant, key))}
    if found:
      best = min(found, key=lambda variant: found[variant].mean)
      parts.append(f'{what}: {best}, {spread_text(found[best])}')
  if not parts:
    return 'No run is finished yet.'
  among, ranked = '', results.ranked
  if ranked != results.variants:
    among = f' (of the {len(ranked)} variants with {results.seeds_text(ranked[0])})'
  return 'Lowest ' + '; lowest '.join(parts) + among + '.'


def spread_text(spread: Spread | None) -> str:
  """'1.2345 ± 0.0012', as many decimals as the spread deserves; '–' for None."""
  if spread is None:
    return '–'
  if abs(spread.mean) >= 1000:
    return f'{spread.mean:,.0f}' + (f' ± {spread.std:,.0f}' if spread.std is not None else '')
  if not spread.std:  # one seed, or all the same
    return f'{spread.mean:.4g}' + (' ± 0' if spread.std is not None else '')
  digits = min(max(1 - math.floor(math.log10(spread.std)), 0), 6)
  return f'{spread.mean:.{digits}f} ± {spread.std:.{digits}f}'


def adjusted_text(adjusted: Adjusted) -> str:
  """'+0.0123 ± 0.0045': the gap to the baseline and its standard error; '–' for what is not known."""
  if adjusted.gap is None:
    return '–'
  return f'{adjusted.gap:+.4f}' + ('' if adjusted.error is None else f' ± {adjusted.error:.4f}')


_RESULTS = (
  'Mean over the finished seeds ± standard deviation; bold: best of a column, of the variants with the most seeds. '
  '"Speed on N" is modelled: training on N devices that share the experts, relative to even loads (see below). Balance '
  'is measured on the validation set (global) and on training batches (batch, last 10% of the steps); entropy is 1 '
  'when balanced. Tokens/s are as measured, less where runs shared a machine.'
)
_PARETO = (
  'Each point a variant, bars the standard deviation over seeds; below and left is better. Perplexities are adjusted '
  'for seeds, as if each had all. A line joins variants that differ in the weight of their auxiliary loss only. '
  'Dotted: no other variant is better in both.'
)
_SIGNIFICANCE = (
  'Both runs of a pair had the same seed, thus the same initial weights and batches. Marks are seeds, bars the 95% '
  'interval of the mean by Student’s t, for one variant by itself; p is that of the paired t-test after Holm’s '
  'correction for all variants. One seed: no test. A bar that leaves the picture is of fewer seeds than the others. '
  'Adjusted, ± standard error: by the least squares of loss = variant + seed + noise over all runs, also those without '
  'a pair.'
)
_COST = (
  'A model, not a measurement: experts spread over so many devices, the slowest of which decides each layer; loads of '
  f'the last 10% of the training steps; {imbalance.FLOPS_PER_S / 1e12:.0f} TFLOP/s and '
  f'{imbalance.LINK_BYTES_PER_S / 1e9:.0f} GB/s a device. 100% is perfect balance.'
)
_VIO = 'MaxVio of each training batch, mean over layers, running mean over steps; bands span the seeds.'
_LOSS = (
  'Running means over steps; bands span the seeds. Above, the loss; below, how far it is from the baseline on the same '
  'batches, which takes most of the noise away.'
)
_HEAT = 'Validation set after training: white is balanced, blue idle, red overloaded (2 or more). First seed of each.'
_NONE_FINISHED = 'No run is finished yet.'
_NO_LOADS = 'No expert loads were logged.'


def _state(results):
  done, planned = sum(member.finished for member in results.members), len(results.sweep.runs)
  seeds = ', '.join(map(str, results.sweep.seeds))
  return f'{done} of {planned} runs finished; {len(results.sweep.variants)} variants, seeds {seeds}.'


def _tables(results):
  """Two tables, so that each is no wider than the page: quality and speed, then balance."""
  columns = metric_names(results)
  is_balance = lambda key: not key.startswith(('val_', 'tokens_', 'throughput_'))
  parts = [[column for column in columns if is_balance(column[0]) == balance] for balance in (False, True)]
  return '\n'.join(_table(results, part) for part in parts)


def _table(results, columns):
  cells = {key: {v: results.spread(v, key) for v in results.variants} for key, _, _ in columns}
  best = {key: _best({v: cells[key][v] for v in results.ranked}, better) for key, _, better in columns}
  head = ''.join(f'<th scope="col">{escape(name)}</th>' for _, name, _ in columns)
  rows = []
  for variant in results.variants:
    row = ''.join(_cell(cells[key][variant], variant in best[key], key) for key, _, _ in columns)
    seeds = len(results.of(variant))
    rows.append(f'<tr><th scope="row">{escape(variant)}</th><td class="number">{seeds}</td>{row}</tr>')
  return (
    '<div class="card wide"><table class="matrix">\n'
    f'<tr><th scope="col">variant</th><th scope="col">seeds</th>{head}</tr>\n' + '\n'.join(rows) + '\n</table></div>'
  )


def _best(spreads, higher_is_better):
  """Names of the variants with the best mean; none if it is the same for all, or no better exists."""
  means = {variant: spread.mean for variant, spread in spreads.items() if spread}
  if higher_is_better is None or len(set(means.values())) < 2:
    return set()
  target = (max if higher_is_better else min)(means.values())
  return {variant for variant, mean in means.items() if mean == target}


def _cell(spread, is_best, key):
  if key.startswith(('throughput_', 'drop_rate')) and spread:
    text = spread_text(type(spread)(100 * spread.mean, spread.std and 100 * spread.std)) + '%'
  else:
    text = spread_text(spread)
  return f'<td class="number">{f"<b>{text}</b>" if is_best else text}</td>'


def _differences(results):
  rows = []
  losses, vios = (results.against_baseline(key) for key in ('val_loss', 'max_vio_global'))
  adjusted = results.adjusted('val_loss')
  for variant, gap in losses.items():
    if gap and (vio := vios[variant]):
      rows.append(
        f'<tr><th scope="row">{escape(variant)}</th><td class="number">{gap.seeds}</td>'
        f'<td class="number">{adjusted_text(adjusted[variant])}</td>{_gap_cells(gap)}{_gap_cells(vio)}</tr>'
      )
  if not rows:
    return ''
  head = ''.join(f'<th scope="col">{name}</th>' for name in ('difference', '95% interval', 'p') * 2)
  return (
    '<div class="card wide"><table class="matrix">\n<tr><td></td><td></td>'
    '<th scope="colgroup" colspan="4">validation loss</th><th scope="colgroup" colspan="3">MaxVio_global</th></tr>\n'
    f'<tr><th scope="col">variant</th><th scope="col">seeds</th><th scope="col">adjusted</th>{head}</tr>\n'
    + '\n'.join(rows)
    + '\n</table></div>\n'
  )


def _gap_cells(gap):
  interval = '–' if gap.low is None else f'{gap.low:+.4f} to {gap.high:+.4f}'
  p = '–' if gap.p is None else f'{gap.p:.2g}'
  if gap.p is not None and gap.p < SIGNIFICANT:
    p = f'<b>{p}</b>'
  return ''.join(f'<td class="number">{cell}</td>' for cell in (f'{gap.mean:+.4f}', interval, p))


def _images(results):
  shown = (
    ('Training loss', sweep_figures.loss(results)),
    ('Loss against the baseline', sweep_figures.loss_gap(results)),
  )
  return '\n'.join(image(title, figure, wide=True) for title, figure in shown if figure)


def verdict_on_fairness(results: Results) -> str:
  """What was checked and held, or what did not."""
  if problems := unfair(results):
    return 'NOT FAIR: ' + '; '.join(problems) + '.'
  return (
    'Checked: all finished runs had the same text, as many training tokens as the others of their seed, and the same '
    'validation tokens; variants that differ in balancing only began each seed with the same loss, so with the same '
    'weights and the same batch. All balance figures come from the same evaluation.'
  )


def _settings(results):
  infos = [member.run.info for member in results.members]
  devices = sorted({str(info.get('device')) for info in infos})
  versions = [info['versions'] if isinstance(info.get('versions'), dict) else {} for info in infos]
  return {'devices': devices, 'jax': sorted({str(found.get('jax')) for found in versions}), **infos[0]['config']}
