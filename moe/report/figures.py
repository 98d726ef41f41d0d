"""Figures of a report, each a small matplotlib `Figure` that stays readable at the width of a phone.

Every function takes a `moe.report.run.Run`. It returns None (or leaves the figure out of its list) when the run has
nothing to show, so that no empty panel is drawn. Figures hold no text from the run: a corpus name may contain any
character.
"""

import io
import math
import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from moe.files import replacing
from moe.report.run import Run, is_finite, thin

BLUE, ORANGE, GREEN, GREY = '#1f6feb', '#d9480f', '#2b8a3e', '#57606a'
WIDTH_IN, HEIGHT_IN = 4.7, 3.1
SUFFIXES = '.png', '.pdf', '.svg'  # of a file that a picture is written to
MAX_LAYER_LABELS = 16  # of a heat map
NAMED_LAYERS = 6  # up to so many layers get a legend entry each, more get a colour bar
LAYER_COLORS = ListedColormap(matplotlib.colormaps['viridis'](np.linspace(0, 0.9, 256)))  # the lightest end is cut off


def loss(run: Run) -> Figure | None:
  """Training loss (raw and running mean) and validation loss, with the trigram and gzip baselines.

  Where the evaluations on the way were of a sample, its points are a curve and the whole text's stand apart.
  The axis is bits per byte, nats per token / ln 2 * tokens per byte, where data.json counts the tokens and bytes of the
  training text; nats per token where it does not.
  """
  steps, nats = run.series('loss')
  if not len(steps):
    return None
  scale = _bits_per_byte(run)
  figure, axes = panel('bits per byte' if scale else 'nats per token', HEIGHT_IN * 1.15)
  curve(axes, steps, nats * (scale or 1), BLUE, 'training')
  for label, marker, points in _evaluations(run, 'val_bits_per_byte' if scale else 'val_loss'):
    axes.plot(*zip(*points, strict=True), marker, color=ORANGE, markeredgecolor='white', label=label, zorder=4)
  for name, style in (('trigram', '--'), ('gzip', ':')) if scale else ():
    value = run.data.get(f'{name}_bits_per_byte')
    if is_finite(value):
      axes.axhline(value, color=GREY, linestyle=style, label=f'{name} {value:.2f}', zorder=1)
  if scale:
    right = axes.secondary_yaxis('right', functions=(lambda bits: bits / scale, lambda nats: nats * scale))
    right.set_ylabel('nats per token')
  legend_above(figure, axes)
  return figure


def max_vio(run: Run) -> Figure | None:
  """MaxVio of each layer's training batches, with the expected MaxVio of random balanced routing (dashed)."""
  steps, vio_NL = run.layer_curves('max_vio')
  if not len(steps):
    return None
  figure, axes = panel('MaxVio', HEIGHT_IN * 1.15)
  curves_by_layer(figure, axes, run, steps, vio_NL, log=True)
  floor = run.max_vio_floor(run.load_history[-1]['load_LE'])
  if floor:
    axes.axhline(floor, color='black', linestyle='--', linewidth=1.3, label='random balanced routing', zorder=4)
  if axes.get_yscale() == 'log':
    plain_log_ticks(axes.yaxis)  # once all is drawn
  legend_above(figure, axes)
  return figure


def heat_maps(run: Run) -> list[tuple[str, Figure]]:
  """(title, load / mean by layer and expert) of the first, middle and last logged batch and the last evaluation."""
  history = run.load_history
  picks = sorted({0, len(history) // 2, len(history) - 1}) if history else []
  loads = [(f'Training batch, step {row["step"]}', row['load_LE']) for row in map(history.__getitem__, picks)]
  if run.evals:
    last = run.evals[-1]
    of = 'Validation sample' if last.get('set') == 'sample' else 'Validation set'
    loads.append((f'{of}, step {last["step"]}', last['load_LE']))
  return [(title, heat_map(run.layer_names, load_LE)) for title, load_LE in loads]


def drop_rate(run: Run) -> Figure | None:
  """Share of the token copies dropped for capacity over time; None if none was."""
  steps, rates = run.series('drop_rate')
  if not rates.any():
    return None
  figure, axes = panel('dropped token copies')
  curve(axes, steps, rates, ORANGE)
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
  axes.set_ylim(bottom=0)
  return figure


def throughput(run: Run) -> Figure | None:
  """Tokens per second over time with their median."""
  steps, rates = run.series('tokens_per_s')
  if not len(steps):
    return None
  figure, axes = panel('tokens / s')
  curve(axes, steps, rates, GREEN, smooth=False)
  median = float(np.median(rates))
  axes.axhline(median, color=GREY, linestyle='--', linewidth=1.2, label=f'median {median:,.0f}')
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.0f}'))
  axes.set_ylim(0, max(1.05 * np.percentile(rates, 99.5), 1.2 * median))
  legend_above(figure, axes)
  return figure


def health(run: Run) -> list[tuple[str, Figure]]:
  """(title, figure) of the router bias range, gate entropy, gradient norm and learning rate, as far as logged."""
  figures = [('Router bias, lowest to highest', _bias_range(run))]
  for title, key, color in (
    ('Gate entropy', 'gate_entropy', GREEN),
    ('Gradient norm', 'grad_norm', BLUE),
    ('Learning rate', 'learning_rate', GREY),
  ):
    figures.append((title, _healthcurve(run, key, color)))
  return [(title, figure) for title, figure in figures if figure]


def to_svg(figure: Figure) -> bytes:
  """The figure as an SVG file; the same figure always gives the same bytes."""
  buffer = io.BytesIO()
  with matplotlib.rc_context({'svg.hashsalt': 'moe'}):
    figure.savefig(buffer, format='svg', metadata={'Date': None})
  return buffer.getvalue()


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes the figure to `path`, of one of SUFFIXES, whole or not at all. Raises UserError."""
  with replacing(path) as temporary:
    figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())


def _evaluations(run, key):
  """(label, marker, [(step, value)]) of each set of rows that was evaluated."""
  beside = lambda row: row['sample'] if isinstance(row.get('sample'), dict) else {}
  sample = [(row['step'], row if row.get('set') == 'sample' else beside(row)) for row in run.evals]
  full = [(row['step'], row) for row in run.evals if row.get('set') != 'sample']
  drawn = []
  for label, marker, rows in (('validation', 'o', full), ('validation, a sample', 'o', sample)):
    if points := [(step, row[key]) for step, row in rows if is_finite(row.get(key))]:
      drawn.append((label, marker, points))
  return [('validation, all', 'D', drawn[0][2]), drawn[1]] if len(drawn) > 1 else drawn


def _bits_per_byte(run):
  """Bits per byte of one nat per token on the training text; None if data.json does not count it."""
  tokens, size = run.data.get('train_tokens'), run.data.get('train_bytes')
  return tokens / size / math.log(2) if tokens and size else None


def _bias_range(run):
  (low_steps, low), (high_steps, high) = run.series('bias_min'), run.series('bias_max')
  if not len(low) or not np.array_equal(low_steps, high_steps):
    return None
  figure, axes = panel('bias')
  steps, low, high = thin(low_steps), thin(low), thin(high)
  axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0)
  for edge in (low, high):
    axes.plot(steps, edge, marker='o' if len(steps) < 3 else None, color=BLUE, linewidth=1.4)
  axes.axhline(0, color=GREY, linewidth=0.8)
  return figure


def _healthcurve(run, key, color):
  steps, values = run.series(key)
  if not len(steps):
    return None
  figure, axes = panel(key.replace('_', ' '))
  curve(axes, steps, values, color, smooth=key != 'learning_rate')
  axes.ticklabel_format(axis='y', style='sci', scilimits=(-2, 4), useMathText=True)
  return figure


def heat_map(names: list[str], load_LE: np.ndarray) -> Figure:
  """Load / mean of its row by expert, of rows with these names."""
  rows, num_experts = load_LE.shape
  figure, axes = panel(None, min(max(1.5 + 0.19 * rows, 2.2), 4.6))
  mean_L = load_LE.mean(-1, keepdims=True)
  share_LE = load_LE / np.where(mean_L > 0, mean_L, 1)
  image = axes.imshow(
    share_LE, cmap='RdBu_r', norm=Normalize(0, 2), aspect='auto', interpolation='none', extent=(0, num_experts, rows, 0)
  )
  axes.grid(False)
  axes.set_xlabel('expert')
  every = math.ceil(rows / MAX_LAYER_LABELS)
  mtp = [i for i, name in enumerate(names) if name.startswith('MTP')]
  labelled = [i for i in range(0, rows - len(mtp), every) if not mtp or every == 1 or mtp[0] - i >= every] + mtp
  axes.set_yticks([i + 0.5 for i in labelled], [names[i] for i in labelled])
  axes.tick_params(axis='y', length=0)
  above = np.max(share_LE) > 2
  bar = figure.colorbar(image, ax=axes, extend='max' if above else 'neither', ticks=[0, 0.5, 1, 1.5, 2], pad=0.02)
  bar.set_label('load / mean')
  return figure


def _layer_colorbar(figure, axes, run, moe_layers):
  first = run.setting('model.num_dense_layers')
  colors = ScalarMappable(Normalize(first, first + moe_layers - 1), LAYER_COLORS)
  bar = figure.colorbar(colors, ax=axes, pad=0.02)
  bar.locator = MaxNLocator(6, integer=True)
  bar.update_ticks()
  bar.set_label('layer')


def curves_by_layer(figure, axes, run: Run, steps, value_NL, smooth: bool = True, log: bool = False, marker=None):
  """A curve per layer, and one per MTP module in another colour: running means, and what they are of faint behind.

  Args:
    figure, axes: from `panel`.
    run: names the layers.
    steps: [N], ascending.
    value_NL: a value per step and layer.
    smooth: draw running means, where there are enough steps.
    log: a logarithmic axis, on which values of 0 have no place.
    marker: matplotlib's, for each value; None: dots where a line would be too short.
  """
  names = run.layer_names
  moe_layers = len(names) - run.setting('model.mtp_depth')
  color_of, few = LAYER_COLORS.resampled(max(moe_layers, 2)), moe_layers <= NAMED_LAYERS
  for i, name in enumerate(names):
    is_mtp = i >= moe_layers
    color, style = (ORANGE, {'linewidth': 1.6, 'zorder': 3}) if is_mtp else (color_of(i), {'linewidth': 1.2})
    shown = name if few or is_mtp else None
    curve(axes, steps, value_NL[:, i], color, shown, smooth, log, marker=marker, alpha=0.9, **style)
  if log and (value_NL > 0).any():
    axes.set_yscale('log')
  if not few:
    _layer_colorbar(figure, axes, run, moe_layers)


def panel(ylabel: str | None, height_in: float = HEIGHT_IN, width_in: float = WIDTH_IN) -> tuple[Figure, Axes]:
  """A figure with one pair of axes over the step."""
  figure = Figure(figsize=(width_in, height_in), layout='constrained')
  axes = figure.add_subplot()
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(color='#d0d7de', linewidth=0.6)
  axes.set_axisbelow(True)
  axes.set_xlabel('step')
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  if ylabel:
    axes.set_ylabel(ylabel)
  return figure, axes


def curve(axes, steps, values, color, label=None, smooth=True, log=False, **style):
  """Raw values faint and their running mean bold, or only the raw values; dots where a line would be too short.

  Args:
    axes: to draw on.
    steps, values: [N] each, steps ascending.
    color: matplotlib's.
    label: in the legend; None: not there.
    smooth: draw the running mean, too, where there are enough steps.
    log: leave out values of 0, such as of perfectly equal loads, which have no place on a logarithmic axis.
    style: matplotlib's, of the bold line.
  """
  shown = lambda values: thin(np.where(values > 0, values, np.nan) if log else values)
  smooth = smooth and len(steps) > 9
  style = {'linewidth': 1.8 if smooth else 1.2, 'markersize': 4} | style
  style['marker'] = style.get('marker') or ('o' if len(steps) < 3 else None)
  if smooth:
    axes.plot(thin(steps), shown(values), color=color, alpha=0.25, linewidth=0.7, zorder=1)
  axes.plot(thin(steps), shown(running_mean(values) if smooth else values), color=color, label=label, **style)


def running_mean(values: np.ndarray) -> np.ndarray:
  """Centred mean over 2% of the values on each side; the window shrinks at both ends, so that it stays centred."""
  index = np.arange(len(values))
  half = np.minimum(np.minimum(index, index[::-1]), math.ceil(0.02 * len(values)))
  total = np.concatenate([[0], np.cumsum(values)])
  return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def legend_above(figure: Figure, axes: Axes) -> None:
  """A legend on top of the figure, outside the axes; none without labels."""
  handles, labels = axes.get_legend_handles_labels()
  if not handles:
    return
  columns = 2 if max(map(len, labels)) > 10 else 4
  legend = figure.legend(handles, labels, loc='outside upper left', ncols=columns, frameon=False)
  for line in legend.get_lines():
    line.set(alpha=1, linewidth=1.8)


def plain_log_ticks(axis: Axis) -> None:
  """0.05, 0.1, 0.2 ... instead of powers of ten; evenly spaced values where the axis spans little."""
  low, high = axis.get_view_interval()
  axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12) if high / low > 8 else MaxNLocator(6))
  axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
  axis.set_minor_locator(NullLocator())
