"""What a MoE layer costs as experts or tokens grow at a fixed top-k: forward + backward, router to combine."""

import functools
import pathlib
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe.bench import layer, profile, rows, timing
from moe.bench.layer import Shape
from moe.report.figures import BLUE, GREY, save

# Shape of the sweeps, experts, tokens.
GPU_SWEEPS = (Shape(2048, 1024, 64, 8, 16384), (16, 32, 64, 128, 256), (4096, 8192, 16384, 32768, 65536))
CPU_SWEEPS = (Shape(256, 128, 64, 4, 4096), (16, 32, 64, 128), (1024, 2048, 4096, 8192))


def measure(
  shape: Shape,
  experts,
  tokens,
  compute: str,
  dense_tflop_per_s: float,
  repeats: int,
  inner: int,
  profiled: bool = False,
) -> list[dict]:
  """A row per number of experts at shape.T tokens, then one per number of tokens at shape.E experts.

  Args:
    shape: of the layer; its numbers of experts and tokens are those of the sweep that varies the other.
    experts, tokens: the numbers of each sweep, of which the first and the last layer are compared with a reference.
    compute: 'float32' or 'bfloat16'.
    dense_tflop_per_s: rate of a dense product on the same machine.
    repeats, inner: as of `timing.median_s`.
    profiled: list the kernels that take longest in each row.
  """
  sweeps = {
    'experts': [shape._replace(E=count) for count in experts],
    'tokens': [shape._replace(T=count) for count in tokens],
  }
  checked = {sweep[i] for sweep in sweeps.values() for i in (0, -1)}
  found: dict[Shape, dict[str, Any]] = {}
  calls = {}
  for one in dict.fromkeys(one for sweep in sweeps.values() for one in sweep):
    with rows.attempt(found, one):
      timing.say(f'scaling {one}: compile{" and check" if one in checked else ""}')
      inputs = layer.make_inputs(one, compute)
      compiled = layer.build(one, inputs, compute)
      errors = layer.check(compiled, one, inputs, layer.TOLERANCE[compute]) if one in checked else {}
      calls[one] = functools.partial(compiled, *inputs)
      found[one] = timing.memory(compiled) | errors | {'kernels': timing.kernels(compiled)}
  timing.say('scaling: timing')
  for one, s in timing.median_s(calls, repeats, inner).items():
    rate = one.tflop / s
    found[one] = {'s': s, 'tflop_per_s': rate, 'of_dense': rate / dense_tflop_per_s} | found[one]
    if profiled:
      found[one]['profile'] = profile.top_kernels(calls[one])
  return [
    {'shape': str(one), 'name': f'over {over}', 'count': _count(one, over)}
    | _of_first(found[one], one, found[sweep[0]], sweep[0])
    for over, sweep in sweeps.items()
    for one in sweep
  ]


def _count(shape, over):
  return shape.E if over == 'experts' else shape.T


def _of_first(row, shape, first_row, first):
  """The row with its time per token, over that of the sweep's first row: 1 would be ideal."""
  if 's' not in row or 's' not in first_row:
    return row
  return {'of_first_per_token': row['s'] / shape.T / (first_row['s'] / first.T)} | row


def plot(found: list[dict], path: pathlib.Path) -> None:
  """Writes a PNG of both sweeps: time per token over that of the sweep's first shape."""
  figure = Figure(figsize=(9, 3.2), layout='constrained')
  for axes, over in zip(figure.subplots(1, 2), ('experts', 'tokens'), strict=True):
    sweep = [row for row in found if row['name'] == f'over {over}' and 's' in row]
    counts = [row['count'] for row in sweep]
    axes.plot(counts, [row['of_first_per_token'] for row in sweep], 'o-', color=BLUE)
    axes.axhline(1, color=GREY, linestyle='--', linewidth=1)
    axes.set_xscale('log', base=2)
    axes.set_xticks(counts, [f'{count:,}' for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.15 * max([1, *(row['of_first_per_token'] for row in sweep)]))
    axes.set_xlabel(over)
    axes.set_ylabel('time per token / that of the first')
    axes.grid(color='#d0d7de', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
  save(figure, path)
