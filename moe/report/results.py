"""What has been run of a sweep: runs and their values, spreads over seeds, differences, and whether it was fair."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe.errors import UserError
from moe.report import imbalance, packed
from moe.report.paired import Adjusted, Difference, adjusted, difference, holm
from moe.report.run import Run, load_run, summarize
from moe.sweep import jobs, manifest

# Key of summary.json, what people call it, and whether more is better (None: neither).
METRICS = (
  ('val_loss', 'validation loss', False),
  ('val_perplexity', 'perplexity', False),
  ('val_bits_per_byte', 'bits/byte', False),
  ('max_vio_global', 'MaxVio_global', False),
  ('max_vio_batch', 'MaxVio_batch', False),
  ('cv_global', 'CV', False),
  ('load_entropy_global', 'load entropy', True),
  ('drop_rate', 'drop rate', False),
  ('tokens_per_s', 'tokens/s', None),
)
AVERAGED = ('max_vio_batch', 'drop_rate', 'tokens_per_s')  # of METRICS: over rows of metrics.jsonl
SAME_LOSS = 1e-4  # relative: two programs with the same weights and text round differently


@dataclasses.dataclass(frozen=True)
class Member:
  """One run of the sweep that has logged something; `values` has METRICS and 'throughput_N' for each N of devices."""

  variant: str
  seed: int
  run: Run
  finished: bool
  values: dict[str, float | None]


class Spread(NamedTuple):
  """Mean and sample standard deviation over seeds; the deviation is None for one seed."""

  mean: float
  std: float | None


@dataclasses.dataclass(frozen=True)
class Results:
  """A sweep and what has been run of it."""

  path: pathlib.Path
  sweep: manifest.Sweep
  members: list[Member]
  missing: list[tuple[str, str]]  # (folder, why) of every run that is not finished
  devices: list[int]  # sizes of the modelled meshes

  @property
  def variants(self) -> list[str]:
    """Names of the variants of which some run has logged something, in the order of declaration."""
    present = {member.variant for member in self.members}
    return [variant.name for variant in self.sweep.variants if variant.name in present]

  @property
  def baseline(self) -> str:
    """The variant that the others are compared with: the first declared."""
    return self.sweep.variants[0].name

  def of(self, variant: str) -> list[Member]:
    """Finished runs of a variant, by seed."""
    return [m for m in self.members if m.variant == variant and m.finished]

  def measured(self, variant: str, key: str) -> list[tuple[int, float]]:
    """(seed, value) of the finished runs of a variant that have a value, by seed."""
    return [(m.seed, value) for m in self.of(variant) if (value := m.values[key]) is not None]

  def shown(self, variant: str) -> list[Member]:
    """Runs whose curves are drawn: the finished ones, or as long as there are none, what there is; by seed."""
    return self.of(variant) or [m for m in self.members if m.variant == variant]

  @property
  def ranked(self) -> list[str]:
    """Variants with the most finished seeds, by declaration: a mean over fewer seeds may be best by chance."""
    most = max(len(self.of(variant)) for variant in self.variants)
    return [variant for variant in self.variants if most and len(self.of(variant)) == most]

  def seeds_text(self, variant: str) -> str:
    """'3 seeds': how many runs of a variant are finished."""
    seeds = len(self.of(variant))
    return f'{seeds} seed' if seeds == 1 else f'{seeds} seeds'

  def spread(self, variant: str, key: str) -> Spread | None:
    """Of a value over the finished runs of a variant that have it; None if none has."""
    values = [value for _, value in self.measured(variant, key)]
    if not values:
      return None
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

  def adjusted(self, key: str) -> dict[str, Adjusted]:
    """By variant, the mean of a value over finished runs, adjusted for seeds, and its gap to the baseline's."""
    found = [(variant, *one) for variant in self.variants for one in self.measured(variant, key)]
    if not found:
      return {}
    variants, seeds, values = zip(*found, strict=True)
    return adjusted(self.baseline, variants, seeds, values)

  def pairs(self, variant: str, key: str) -> tuple[list[float], list[float]]:
    """(the baseline's values, the variant's) of the seeds for which both are finished and have the value."""
    base = dict(self.measured(self.baseline, key))
    common = [(seed, value) for seed, value in self.measured(variant, key) if seed in base]
    return [base[seed] for seed, _ in common], [value for _, value in common]

  def against_baseline(self, key: str) -> dict[str, Difference | None]:
    """For every other variant, its paired difference to the baseline over common finished seeds (p after Holm)."""
    others = [variant for variant in self.variants if variant != self.baseline]
    found = {variant: difference(*self.pairs(variant, key)) for variant in others}
    adjusted = holm([d.p if d else None for d in found.values()])
    return {name: d and d._replace(p=p) for (name, d), p in zip(found.items(), adjusted, strict=True)}


def load_results(path: pathlib.Path) -> Results:
  """Reads a results folder: of a sweep, also one that is still going, or what `moe thin` made of it.

  Raises:
    UserError: no results folder of a sweep of this version, or none of its runs has logged anything yet.
  """
  runs: Mapping[str, Run | str]
  if os.path.lexists(path / packed.FILE):
    sweep, runs = packed.read(path)
  else:
    sweep = manifest.read(path)
    runs = {planned.folder: _run_or_why_not(path / planned.folder) for planned in sweep.runs}
  members, missing = [], []
  devices = imbalance.device_counts(sweep.base.model.num_experts)
  for planned in sweep.runs:
    run = runs.get(planned.folder, 'not started')
    if isinstance(run, str):
      missing.append((planned.folder, run))
      continue
    summary = summarize(run)
    if not summary['finished']:
      words = jobs.last_words(run.path)
      reached = f'step {summary["steps"]} of {planned.config.train.steps}'
      missing.append((planned.folder, f'{reached}; {words}' if words.startswith('error: ') else reached))
    values = {key: summary[key] for key, _, _ in METRICS} | averages(run, devices)
    members.append(Member(planned.variant, planned.seed, run, summary['finished'], values))
  if not members:
    damaged = ''.join(f'; {name} {why}' for name, why in missing if why.startswith('cannot be read'))
    raise UserError(f'{path} has no runs to report: none of its {len(sweep.runs)} runs has logged a step{damaged}')
  return Results(path, sweep, members, missing, devices)


def averages(run: Run, devices: list[int]) -> dict[str, float | None]:
  """The values of a `Member` that are averages over rows: those of all rows, if only some were kept and it is known.

  Args:
    devices: sizes of the modelled meshes.
  """
  summary, num_experts = summarize(run), run.setting('model.num_experts')  # a variant may have others than the base
  found = {key: summary[key] for key in AVERAGED}
  for n in devices:
    found[f'throughput_{n}'] = None if num_experts % n else imbalance.relative_throughput(run, n)
  return found | {key: value for key, value in run.averages.items() if key in found}


def _run_or_why_not(folder: pathlib.Path) -> Run | str:
  """A run that has logged something, or why there is none to report."""
  if not jobs.steps_done(folder):
    return jobs.last_words(folder) or 'not started'
  try:
    return load_run(folder)
  except UserError as error:
    return f'cannot be read: {error}'


def metric_names(results: Results) -> list[tuple[str, str, bool | None]]:
  """METRICS, and the modelled throughput of each mesh."""
  return [*METRICS, *((f'throughput_{n}', f'speed on {n}', True) for n in results.devices)]


def unfair(results: Results) -> list[str]:
  """What was not the same in all runs though it should have been; empty if the comparison is fair.

  All finished runs must have seen the same text and as many tokens, and been evaluated on as many. Of runs with the
  same seed whose variants differ in balancing only, the first loss must agree: same weights, same batch.
  """
  problems = []
  done = [member for member in results.members if member.finished]
  for what, value_of in (
    ('text', lambda m: m.run.data.get('digest')),
    ('training tokens', lambda m: m.run.rows[-1].get('tokens')),
    ('validation tokens', lambda m: m.run.evals[-1].get('val_tokens')),
  ):
    values = {str(value_of(member)) for member in done}  # text: from a file, it may be anything
    if len(values) > 1 and (what != 'training tokens' or not _equal_by_seed(done, value_of)):
      problems.append(f'not all runs had the same {what}: {", ".join(sorted(values))}')
  for seed in results.sweep.seeds:
    first = {m.variant: m.run.rows[0]['loss'] for m in results.members if m.seed == seed and _balance_only(results, m)}
    if first and max(first.values()) - min(first.values()) > SAME_LOSS * max(first.values()):
      spread = ', '.join(f'{name} {loss:.6f}' for name, loss in first.items())
      problems.append(f'the first losses of seed {seed} differ: {spread}')
  return problems


def _equal_by_seed(members, value_of):
  """Documents end in other places with another seed, so that slightly other numbers of tokens are predicted."""
  by_seed: dict[int, set[str]] = {}
  for member in members:
    by_seed.setdefault(member.seed, set()).add(str(value_of(member)))
  return all(len(values) == 1 for values in by_seed.values())


def _balance_only(results, member):
  """Whether a run differs from the base in balancing only, and logged its first step."""
  overrides = next(v.overrides for v in results.sweep.variants if v.name == member.variant)
  plain = overrides.get('balance.bias_rule') != 'multiplicative'  # whose bias starts at 1
  return plain and member.run.rows[0]['step'] == 1 and all(key.startswith('balance.') for key in overrides)
