"""Rows of results: beside a peer, in print, and what to make of a contender that fails."""

import contextlib
import json
import traceback
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np

from moe.bench import profile
from moe.bench.timing import say
from moe.files import write_atomically
from moe.files.paths import local_path

PEERS = ('torch', 'Hugging Face')


@contextlib.contextmanager
def attempt(found: dict, name: Hashable) -> Iterator[None]:
  """Turns an exception into a row that says so: the other contenders' numbers are worth having all the same."""
  try:
    yield
  except Exception as error:
    traceback.print_exc()
    say(f'{name} failed')
    found[name] = {'failed': f'{type(error).__name__}: {error}'[:300]}


def beside_peer(rows: list[dict], peer: str) -> list[dict]:
  """The rows with 'of_peer', ratio of their rates to that of the row named `peer`, if it is there."""
  rate = next((row['tflop_per_s'] for row in rows if row['name'] == peer and 'tflop_per_s' in row), None)
  return [row | ({'of_peer': row['tflop_per_s'] / rate} if rate and 'tflop_per_s' in row else {}) for row in rows]


def geometric_means(rows: list[dict]) -> dict[str, float]:
  """Contender -> geometric mean over the shapes of its rate / the peer's; {} without peers."""
  rates: dict[str, dict[str, float]] = {}
  for row in rows:
    if 'tflop_per_s' in row:
      rates.setdefault(row['shape'], {})[row['name']] = row['tflop_per_s']
  logs: dict[str, list[float]] = {}
  for of_shape in rates.values():
    peer = next((rate for name, rate in of_shape.items() if name.startswith(PEERS)), None)
    for name, rate in of_shape.items():
      if peer and not name.startswith(('dense', *PEERS)):
        logs.setdefault(name, []).append(np.log(rate / peer))
  return {name: float(np.exp(np.mean(ratios))) for name, ratios in logs.items()}


def show(suite: str, machine: str, results: list[dict], notes: list[str], path: str) -> None:
  """Prints the rows, each with its profile if it has one, and writes them to `path` as JSON unless that is ''.

  Args:
    suite: its name.
    machine: device and versions, in words.
    results: the rows, each of values by name.
    notes: lines to print below them; '' are left out.
    path: of the JSON file.
  """
  for row in results:
    entries = ((key, value) for key, value in row.items() if key != 'profile')
    print('  '.join(f'{key} {value:.4g}' if isinstance(value, float) else f'{value!s:16}' for key, value in entries))
    if 'profile' in row:
      print(profile.table(row['profile']))
  means = geometric_means(results)
  if path:
    found: dict[str, Any] = {'suite': suite, 'machine': machine, 'results': results}
    found |= {'geometric_mean_of_peer': means} if means else {}
    write_atomically(local_path(path, '--json'), json.dumps(found, indent=2) + '\n')
  print('\n'.join([machine, *filter(None, notes)]))
  if means:
    print('geometric mean of rate / peer: ' + ', '.join(f'{name} {mean:.3f}' for name, mean in means.items()))
