"""Figures that compare the variants of a sweep. A variant has the same colour and marker in all of them."""

import math

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.balance import metrics
from moe.report.figures import GREY, panel, plain_log_ticks, running_mean, thin
from moe.report.results import Results
from moe.sweep.variants import Variant

WIDTH_IN = 8.6
BASE_COLOR = '#000000'
COLORS = (
  *('#1f6feb', '#d9480f', '#2b8a3e', '#9c36b5', '#e6a700', '#0c8599', '#c2255c', '#74b816', '#845ef7', '#a0522d'),
  *('#4dabf7', '#ff922b', '#868e96', '#63e6be', '#f783ac', '#5c7cfa', '#c0a000', '#087f5b', '#e8590c', '#343a40'),
)
KINDS = {  # how a variant balances: marker
  'router bias': 'o',
  'auxiliary loss': 's',
  'both': 'D',
  'no balancing': 'X',
}
MAX_MAPS = 24  # of load heat maps side by side
LEGEND_COLUMNS = 4


def loss_gap(results: Results) -> Figure | None:
  """Running mean of each variant's training loss minus the baseline's on the same batches of the same seed."""
  gaps = {}
  for variant in results.variants:
    curves = [_gap_of(results, member) for member in results.shown(variant)]
    if variant != results.baseline and (found := _band([curve for curve in curves if curve is not None])):
      gaps[variant] = found
  if not gaps:
    return None
  figure, axes = panel(f'loss - loss of {results.baseline}, nats', 3.6, WIDTH_IN)
  axes.axhline(0, color=BASE_COLOR, linewidth=1.6)
  _draw_bands(results, figure, axes, gaps)
  # The first steps differ most and say least.
  late = np.concatenate([np.abs(mean[len(mean) // 5 :]) for _, mean, _, _ in gaps.values()])
  limit = 1.25 * float(np.quantile(late, 0.99)) if len(late) else 0
  if limit:
    axes.set_ylim(-limit, limit)
  return figure


def loss(results: Results) -> Figure | None:
  """Running mean of the training loss."""
  bands = {}
  for variant in results.variants:
    runs = [member.run.series('loss') for member in results.shown(variant)]
    if found := _band([(steps, running_mean(values)) for steps, values in runs if len(steps)]):
      bands[variant] = found
  if not bands:
    return None
  figure, axes = panel('training loss, nats per token', 3.6, WIDTH_IN)
  _draw_bands(results, figure, axes, bands)
  low = min(mean.min() for _, mean, _, _ in bands.values())
  # A fifth of the run on, all variants are past the steep beginning, which would press the rest together.
  high = max(mean[len(mean) // 5 :].max() for _, mean, _, _ in bands.values())
  axes.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low) or None)
  return figure


def max_vio(results: Results) -> Figure | None:
  """Running mean of MaxVio of the training batches, mean over layers."""
  bands, floors = {}, []
  for variant in results.variants:
    members = results.shown(variant)
    runs = [member.run.series('max_vio_batch') for member in members]
    if found := _band([(steps, running_mean(values)) for steps, values in runs if len(steps)]):
      bands[variant] = found
    floors += [m.run.max_vio_floor(m.run.load_history[-1]['load_LE']) for m in members[:1] if m.run.load_history]
  if not bands:
    return None
  figure, axes = panel('MaxVio of a training batch', 3.9, WIDTH_IN)
  axes.set_yscale('log')
  if floors and floors[0]:
    axes.axhline(floors[0], color=GREY, linestyle='--', linewidth=1.3, label='random balanced routing')
  _draw_bands(results, figure, axes, bands)
  plain_log_ticks(axes.yaxis)
  return figure


def heat_maps(results: Results) -> Figure | None:
  """Load / mean by layer and expert over the validation set after training, a map per variant (its first seed)."""
  chosen = [members[0] for variant in results.variants if (members := results.of(variant))][:MAX_MAPS]
  if not chosen:
    return None
  columns = 2 if len(chosen) in (2, 4) else min(3, len(chosen))
  rows = math.ceil(len(chosen) / columns)
  layers = chosen[0].run.load_shape[0]
  height_in = 0.6 + rows * min(0.75 + 0.12 * layers, 2.6)
  figure = Figure(figsize=(WIDTH_IN, height_in), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  for axes in grid.flat[len(chosen) :]:
    axes.set_visible(False)
  for axes, member in zip(grid.flat, chosen, strict=False):
    image = _heat_map(axes, member)
  bar = figure.colorbar(image, ax=grid, extend='max', ticks=[0, 0.5, 1, 1.5, 2], shrink=min(1.0, 2.2 / height_in))
  bar.set_label('load / mean')
  return figure


def pareto(results: Results) -> Figure | None:
  """Validation perplexity against MaxVio_global, as in figure 2 of arXiv 2408.15664; below and left is better.

  The perplexities are adjusted for seeds.
  """
  points = {}
  adjusted = results.adjusted('val_perplexity')
  for variant in results.variants:
    x, y = results.spread(variant, 'max_vio_global'), results.spread(variant, 'val_perplexity')
    if x and y and x.mean > 0:
      points[variant] = (x, y._replace(mean=adjusted[variant].mean))
  if not points:
    return None
  figure, axes = panel('validation perplexity', 4.6, WIDTH_IN)
  axes.set_xlabel('MaxVio_global')
  axes.set_xscale('log')
  for group in _weight_series(results, points):
    axes.plot(*zip(*[(points[v][0].mean, points[v][1].mean) for v in group], strict=True), color=GREY, linewidth=1)
  for variant, (x, y) in points.items():
    label = f'{variant}, {results.seeds_text(variant)}'
    axes.errorbar(x.mean, y.mean, y.std, x.std, label=label, markersize=9, capsize=2, **_style(results, variant))
  front = _front([(x.mean, y.mean) for x, y in points.values()])
  axes.step(*zip(*front, strict=True), where='post', color=GREY, linestyle=':', linewidth=1.4, label='Pareto front')
  plain_log_ticks(axes.xaxis)
  kinds = {_kind(results, variant) for variant in points}
  for kind in [kind for kind in KINDS if kind in kinds]:
    axes.plot([], [], KINDS[kind], color='white', markeredgecolor=GREY, markersize=8, label=kind)
  axes.grid(which='both', color='#d0d7de', linewidth=0.5)
  figure.legend(loc='outside right center', frameon=False, fontsize=9)
  return figure


def quality(results: Results) -> Figure | None:
  """Difference of each variant's validation loss to the baseline's: every seed, the mean, and its 95% interval.

  Where variants have other numbers of seeds, intervals of fewer than the most may leave the picture: those of two seeds
  are a dozen times as wide as the seeds differ.
  """
  gaps = {variant: gap for variant, gap in results.against_baseline('val_loss').items() if gap}
  if not gaps:
    return None
  figure, axes = _by_variant(gaps, 'validation loss - that of ' + results.baseline + ', nats per token')
  axes.axvline(0, color=BASE_COLOR, linewidth=1.2)
  most = max(gap.seeds for gap in gaps.values())
  inside: list[float] = []
  for row, (variant, gap) in enumerate(gaps.items()):
    style = _style(results, variant)
    differences = np.subtract(*results.pairs(variant, 'val_loss')[::-1])
    inside.extend(differences)
    if gap.low is not None and gap.high is not None:
      axes.plot([gap.low, gap.high], [row, row], color=style['color'], linewidth=2)
      if gap.seeds == most:
        inside.extend((gap.low, gap.high))
    if gap.seeds > 1:
      axes.plot(differences, [row] * gap.seeds, '|', color=style['color'], markersize=9)
    axes.plot(gap.mean, row, markersize=8, **style)
  if np.ptp([0, *inside]):
    margin = 0.05 * np.ptp([0, *inside])
    axes.set_xlim(min(0, *inside) - margin, max(0, *inside) + margin)
  return figure


def throughput(results: Results) -> Figure | None:
  """Modelled training speed with the recorded loads, relative to even loads, for each number of devices."""
  found = {}
  for variant in results.variants:
    spreads = [results.spread(variant, f'throughput_{n}') for n in results.devices]
    if spreads and all(spreads):
      found[variant] = [100 * spread.mean for spread in spreads if spread]
  if not found:
    return None
  figure, axes = _by_variant(found, 'modelled tokens/s, % of that with even loads')
  shades = ('#91c3ff', '#1f6feb', '#0a3069')[-len(results.devices) :]
  for row, values in enumerate(found.values()):
    axes.plot([min(values), max(values)], [row, row], color='#d0d7de', linewidth=3, zorder=1)
  for n, shade, of_n in zip(results.devices, shades, zip(*found.values(), strict=True), strict=True):
    axes.plot(of_n, range(len(found)), 'o', color=shade, markersize=7, label=f'{n} devices', zorder=2)
  axes.set_xlim(right=max(101, 1.01 * max(map(max, found.values()))))
  figure.legend(loc='outside upper right', ncols=3, frameon=False)
  return figure


def _gap_of(results, member):
  base = [m for m in results.shown(results.baseline) if m.seed == member.seed]
  if not base:
    return None
  (steps, losses), (base_steps, base_losses) = member.run.series('loss'), base[0].run.series('loss')
  both, at, base_at = np.intersect1d(steps, base_steps, return_indices=True)
  return (both, running_mean(losses[at] - base_losses[base_at])) if len(both) else None


def _band(curves):
  """(steps that all curves have, mean, lowest, highest there) of (steps, values) curves; None without any step."""
  steps = curves[0][0] if curves else np.array([])
  for other, _ in curves[1:]:
    steps = np.intersect1d(steps, other)
  if not len(steps):
    return None
  values = np.array([values[np.isin(own, steps)] for own, values in curves])
  return steps, values.mean(0), values.min(0), values.max(0)


def _draw_bands(results, figure, axes, bands):
  for variant, (steps, *curves) in bands.items():
    mean, low, high = map(thin, curves)
    color = _style(results, variant)['color']
    bold = variant == results.baseline
    marker = 'o' if len(steps) < 3 else None
    axes.plot(thin(steps), mean, marker=marker, color=color, linewidth=2.2 if bold else 1.4, label=variant)
    axes.fill_between(thin(steps), low, high, color=color, alpha=0.15, linewidth=0)
  figure.legend(loc='outside upper left', ncols=LEGEND_COLUMNS, frameon=False, fontsize=9)


def _heat_map(axes, member):
  load_LE = member.run.evals[-1]['load_LE']
  layers, num_experts = load_LE.shape
  mean_L = load_LE.mean(-1, keepdims=True)
  image = axes.imshow(
    load_LE / np.where(mean_L > 0, mean_L, 1),
    cmap='RdBu_r',
    norm=Normalize(0, 2),
    aspect='auto',
    interpolation='none',
    extent=(0, num_experts, layers, 0),
  )
  axes.set_title(f'{member.variant}: MaxVio {metrics.max_vio(load_LE).mean():.3g}', fontsize=9)
  names = member.run.layer_names
  shown = range(layers) if layers <= 4 else (0, layers - 1)
  axes.set_yticks([i + 0.5 for i in shown], [names[i] for i in shown], fontsize=8)
  axes.tick_params(axis='y', length=0)
  axes.tick_params(axis='x', labelsize=8)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  return image


def _by_variant(names, xlabel):
  figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.27 * len(names)), layout='constrained')
  axes = figure.add_subplot()
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='x', color='#d0d7de', linewidth=0.6)
  axes.set_axisbelow(True)
  axes.set_yticks(range(len(names)), list(names))
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.tick_params(axis='y', length=0)
  axes.set_xlabel(xlabel)
  return figure, axes


def _style(results, variant):
  """Colour by the place among all declared variants, so that it stays the same while a sweep fills up."""
  declared = [v.name for v in results.sweep.variants]
  color = BASE_COLOR if variant == results.baseline else COLORS[(declared.index(variant) - 1) % len(COLORS)]
  return {'color': color, 'marker': KINDS[_kind(results, variant)], 'markeredgecolor': 'white', 'linestyle': ''}


def _kind(results, variant):
  run = results.shown(variant)[0].run
  bias, loss = (run.setting(f'balance.{key}') != 'none' for key in ('bias_rule', 'aux_loss'))
  return 'both' if bias and loss else 'router bias' if bias else 'auxiliary loss' if loss else 'no balancing'


def _weight_series(results, points):
  """Names of variants that differ in the weight of their auxiliary loss only, by that weight; two or more each."""
  groups: dict[tuple, list[Variant]] = {}  # by their other overrides
  for variant in results.sweep.variants:
    if variant.name in points and 'balance.aux_alpha' in variant.overrides:
      rest = {key: value for key, value in variant.overrides.items() if key != 'balance.aux_alpha'}
      groups.setdefault(tuple(sorted(rest.items())), []).append(variant)
  by_weight = lambda variant: variant.overrides['balance.aux_alpha']
  return [[v.name for v in sorted(group, key=by_weight)] for group in groups.values() if len(group) > 1]


def _front(points):
  """The points that no other is below and left of, from left to right."""
  front: list[tuple[float, float]] = []
  for x, y in sorted(points):
    if not front or y < front[-1][1]:
      front.append((x, y))
  return front
