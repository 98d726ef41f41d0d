"""Figures of what experts do, beside those of `moe.report.figures`, whose docstring holds for them, too."""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.balance import metrics
from moe.report import figures
from moe.report.experts import Experts
from moe.report.figures import (
  BLUE,
  GREY,
  ORANGE,
  curve,
  legend_above,
  panel,
  plain_log_ticks,
)
from moe.report.routing import spread
from moe.report.run import Run

MOST_LAYERS = 6  # with a figure each
MOST_NAME = 20  # characters
TEN = ListedColormap(colormaps['tab20'](np.r_[0:20:2, 1:20:2]))


def label(text: str) -> str:
  """A name from a run as matplotlib may draw it: letters that every font has, no formula, and not too long."""
  plain = ''.join(char if ' ' <= char <= '~' else '?' for char in text)
  cut = plain if len(plain) <= MOST_NAME else f'..{plain[2 - MOST_NAME :]}'
  return cut.replace('$', r'\$').lstrip('_')  # matplotlib leaves names that begin with _ out of legends


def by_layer(run: Run, name: str) -> Figure | None:
  """A metric of each training batch, a curve per layer; None where no loads were logged."""
  steps, value_NL = run.layer_curves(name)
  if not len(steps):
    return None
  figure, axes = panel(metrics.METRICS[name].title)
  figures.curves_by_layer(figure, axes, run, steps, value_NL)
  legend_above(figure, axes)
  return figure


def mean_only(run: Run, name: str) -> Figure | None:
  """A logged metric whose function is not here: its mean over layers."""
  steps, values = run.series(f'{name}_batch')
  if not len(steps):
    return None
  figure, axes = panel(label(name.replace('_', ' ')))
  curve(axes, steps, values, BLUE)
  return figure


def dead_experts(run: Run) -> Figure | None:
  """How many experts of each layer a training batch left without tokens; None if it never left any."""
  steps, dead_NL = run.layer_curves('dead_experts')
  if not dead_NL.any():
    return None
  figure, axes = panel('experts without tokens')
  figures.curves_by_layer(figure, axes, run, steps, dead_NL)
  axes.set_ylim(bottom=0)
  axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
  legend_above(figure, axes)
  return figure


def bias_maps(run: Run) -> list[tuple[str, Figure]]:
  """(layer, bias of each expert by step), of layers spread over the model."""
  rows = run.biases
  if len(rows) < 2:
    return []
  steps, bias_NLE = np.array([row['step'] for row in rows]), np.array([row['bias_LE'] for row in rows])
  names = run.layer_names
  return [(names[i], _bias_map(steps, bias_NLE[:, i])) for i in spread(len(names), MOST_LAYERS)]


def _bias_map(steps, bias_NE):
  figure, axes = panel('expert')
  middle = 1.0 if bias_NE.min() > 0.5 else 0.0  # of a rule whose bias is a factor
  reach = max(np.abs(bias_NE - middle).max(), 1e-9)
  edges = np.concatenate([[steps[0] - (steps[1] - steps[0])], steps])
  edges = np.maximum(edges, 0)
  mesh = axes.pcolormesh(
    edges,
    np.arange(bias_NE.shape[1] + 1),
    bias_NE.T,
    cmap='PuOr_r',
    norm=Normalize(middle - reach, middle + reach),
    rasterized=True,
  )
  axes.grid(False)
  axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
  figure.colorbar(mesh, ax=axes, pad=0.02).set_label('bias')
  return figure


def source_loads(run: Run, experts: Experts) -> list[tuple[str, Figure]]:
  """(layer, share of each expert by source), of layers spread over the model; [] of text of one source."""
  if len(experts.sources) < 2:
    return []
  some = [i for i, load_LE in enumerate(experts.load_SLE) if load_LE.any()]
  names, layers = ['all text', *(label(experts.sources[i]) for i in some)], run.layer_names
  loads = np.concatenate([experts.load_SLE.sum(0, keepdims=True), experts.load_SLE[some]])
  return [(layers[i], figures.heat_map(names, loads[:, i])) for i in spread(len(layers), MOST_LAYERS)]


def specialisation(run: Run, experts: Experts) -> Figure:
  """Mutual information of token and expert per layer, in the newest evaluation, and what chance alone would show."""
  figure, axes = panel('bits')
  place = np.arange(len(experts.information_bits))
  found, bias = np.array(experts.information_bits), np.array(experts.bias_bits)
  axes.bar(place, found - bias, color=BLUE, width=0.7, label='token and expert')
  axes.plot(place, found, 'o', color=ORANGE, markersize=4, label='before correction')
  axes.plot(place, experts.expert_bits, '_', color=GREY, markersize=14, label='expert alone (most)')
  names, every = run.layer_names, math.ceil(len(place) / 9)
  axes.set_xticks(place[::every], names[::every], rotation=30 if len(place) > 5 else 0)
  axes.set_xlabel('')
  legend_above(figure, axes)
  return figure


def specialisation_over_time(run: Run) -> Figure | None:
  """The same, corrected, by step and layer; None for fewer than two evaluations."""
  routers = len(run.layer_names)
  found = [(row['step'], row.get('specialisation_bits')) for row in run.evals]
  rows = [(step, bits) for step, bits in found if isinstance(bits, list) and len(bits) == routers]
  rows = [(step, bits) for step, bits in rows if all(figures.is_finite(one) for one in bits)]
  if len(rows) < 2:
    return None
  figure, axes = panel('bits')
  steps, bits_NL = zip(*rows, strict=True)
  figures.curves_by_layer(figure, axes, run, np.array(steps), np.array(bits_NL, float), smooth=False, marker='o')
  legend_above(figure, axes)
  return figure


def source_loss(run: Run) -> Figure | None:
  """Validation loss of each source by step, of the same rows of the text as far as that was logged."""
  points: dict[str, list[tuple[int, float]]] = {}
  for row in run.evals:
    beside = row['sample'] if isinstance(row.get('sample'), dict) else {}
    found = beside.get('source_loss', row.get('source_loss'))
    for name, value in found.items() if isinstance(found, dict) else ():
      if figures.is_finite(value):
        points.setdefault(name, []).append((row['step'], value))
  if len(points) < 2:
    return None
  figure, axes = panel('nats per token', figures.HEIGHT_IN * 1.25)
  for i, (name, line) in enumerate(points.items()):
    axes.plot(*zip(*line, strict=True), marker='o', markersize=3, color=TEN(i), label=label(name))
  legend_above(figure, axes)
  return figure


def mtp_loss(run: Run) -> Figure | None:
  """Training loss of the MTP modules beside that of the model; None without modules."""
  steps, values = run.series('mtp_loss')
  if not values.any() or not run.setting('model.mtp_depth'):
    return None
  figure, axes = panel('nats per token')
  curve(axes, *run.series('loss'), BLUE, 'next token')
  curve(axes, steps, values, ORANGE, 'MTP, one further')
  points = [(row['step'], row['val_mtp_loss']) for row in run.evals if figures.is_finite(row.get('val_mtp_loss'))]
  if points:
    axes.plot(*zip(*points, strict=True), 'o', color=ORANGE, markeredgecolor='white', label='MTP, validation', zorder=4)
  legend_above(figure, axes)
  return figure


def gradient_norms(run: Run) -> Figure | None:
  """Gradient norm of each group of parameters; None if they were not logged."""
  groups = sorted({key for row in run.rows[-1:] for key in row if key.startswith('grad_norm/')})
  figure, axes = panel('gradient norm', figures.HEIGHT_IN * 1.2)
  for i, key in enumerate(groups):
    steps, values = run.series(key)
    if len(steps) and (values > 0).any():
      curve(axes, steps, values, TEN(i), label(key.removeprefix('grad_norm/')), log=True)
  if not axes.lines:
    return None
  axes.set_yscale('log')
  plain_log_ticks(axes.yaxis)
  legend_above(figure, axes)
  return figure
