"""Writes the report of a sweep: report.html, its two main pictures, table.csv by variant and runs.csv."""

import csv
import io
import pathlib
from typing import Any

from moe.files import write_atomically
from moe.report import figures, sweep_figures, sweep_html
from moe.report.paired import Adjusted, Difference
from moe.report.results import Results, Spread, load_results, metric_names

PICTURES = {'pareto.png': sweep_figures.pareto, 'max_vio.png': sweep_figures.max_vio}


def write_sweep_report(path: pathlib.Path) -> str:
  """Writes report.html, PICTURES, table.csv (by variant) and runs.csv into a results folder.

  Returns:
    The table as text.

  Raises:
    UserError: see `load_results`; or the folder cannot be written to.
  """
  results = load_results(path)
  write_atomically(path / 'table.csv', _csv(table_rows(results)))
  write_atomically(path / 'runs.csv', _csv(run_rows(results)))
  write_atomically(path / 'report.html', sweep_html.page(results))
  for name, draw in PICTURES.items():
    if figure := draw(results):
      figures.save(figure, path / name)
  return _text_table(results)


def table_rows(results: Results) -> list[dict[str, Any]]:
  """One row per variant: mean and standard deviation of every metric over finished seeds; its loss against others'."""
  rows = []
  against, adjusted = results.against_baseline('val_loss'), results.adjusted('val_loss')
  for variant in results.variants:
    row = {'variant': variant, 'finished_seeds': len(results.of(variant))}
    for key, _, _ in metric_names(results):
      spread = results.spread(variant, key)
      row |= {f'{key}_{name}': getattr(spread, name, None) for name in Spread._fields}
    gap = against.get(variant)
    row |= {f'val_loss_difference_{name}': getattr(gap, name, None) for name in Difference._fields}
    row |= {f'val_loss_adjusted_{name}': getattr(adjusted.get(variant), name, None) for name in Adjusted._fields}
    rows.append(row)
  return rows


def run_rows(results: Results) -> list[dict[str, Any]]:
  """One row per run that has logged something."""
  return [{'variant': m.variant, 'seed': m.seed, 'finished': m.finished, **m.values} for m in results.members]


def _csv(rows):
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, rows[0])
  writer.writeheader()
  writer.writerows(rows)
  return buffer.getvalue()


def _text_table(results):
  header = ('variant', 'seeds', 'validation loss', 'MaxVio_global', 'tokens/s')
  lines = [header]
  for variant in results.variants:
    cells = [
      sweep_html.spread_text(results.spread(variant, key)) for key in ('val_loss', 'max_vio_global', 'tokens_per_s')
    ]
    lines.append((variant, str(len(results.of(variant))), *cells))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  table = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
  return '\n'.join([*table, f'report: {results.path / "report.html"}'])
