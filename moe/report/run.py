"""Reads a run directory and sums it up."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np

from moe import plugins
from moe.balance import load_history, metrics
from moe.config import Config
from moe.errors import UserError
from moe.files import digests, read_bytes, read_json, read_rows
from moe.report.experts import Experts, load_experts

TAIL_FRACTION = 0.1  # last fraction of the rows behind the summary's training means
CONTENTS = (
  'a run directory holds config.json and metrics.jsonl, and as far as the run got data.json, load_history.jsonl, '
  'evals.jsonl, experts.json and sample.txt'
)
COUNTS = tuple(f'model.{key}' for key in ('num_layers', 'num_dense_layers', 'num_experts', 'top_k', 'mtp_depth'))
COUNTS += ('train.steps',)
MEASURED = ('_bytes', '_tokens', '_per_byte')  # how names of numbers in data.json end
MAX_SAMPLE_BYTES = 1 << 24
MAX_POINTS = 1500  # of one curve
Values = TypeVar('Values', np.ndarray, range)
MESH_AXES = ('pipe', 'data', 'expert', 'tensor')


@dataclasses.dataclass(frozen=True)
class Run:
  """The files of one run directory. Rows are in ascending order of their 'step'."""

  path: pathlib.Path
  info: dict[str, Any]  # config.json: moe.train.run_dir.describe_run says what is in it
  data: dict[str, Any]  # data.json; {} if there is none
  rows: list[dict[str, Any]]  # metrics.jsonl, at least one row
  load_history: Sequence[dict[str, Any]]  # load_history.jsonl, 'load_LE' as int64 [L, E]; read as it is looked at
  evals: list[dict[str, Any]]  # evals.jsonl, 'load_LE' as int64 [L, E]
  sample: str | None  # sample.txt
  experts: Experts | None = None  # experts.json
  averages: dict[str, float | None] = dataclasses.field(default_factory=dict)  # over all rows, where some are kept

  @property
  def name(self) -> str:
    return self.path.resolve().name

  def setting(self, key: str) -> Any:
    """Value of a config key such as 'model.top_k'. Raises UserError if config.json lacks it or has another type."""
    value = self.info['config']
    kind: object = Config()
    for part in key.split('.'):
      if not isinstance(value, dict) or part not in value:
        raise UserError(f'{self.path / "config.json"} has no setting {key!r}; {CONTENTS}')
      value, kind = value[part], getattr(kind, part, None)
    if type(value) is not type(kind) and not (isinstance(kind, float) and _number(value) is not None):
      raise UserError(f'{self.path / "config.json"}: {key} = {str(value)[:40]!r} must be of type {type(kind).__name__}')
    return value

  @property
  def load_shape(self) -> tuple[int, int]:
    """(L, E) of every load_LE: the MoE layers and then the MTP modules, by experts."""
    moe_layers = self.setting('model.num_layers') - self.setting('model.num_dense_layers')
    return moe_layers + self.setting('model.mtp_depth'), self.setting('model.num_experts')

  @property
  def layer_names(self) -> list[str]:
    """Names of the rows of load_LE: 'layer i' in the model's numbering from 0 (dense layers count), then 'MTP i'."""
    layers = range(self.setting('model.num_dense_layers'), self.setting('model.num_layers'))
    return [f'layer {i}' for i in layers] + [f'MTP {i}' for i in range(self.setting('model.mtp_depth'))]

  @property
  def starts(self) -> list[dict[str, Any]]:
    """What config.json says of each start of the run; [] for a run from before it did."""
    starts = self.info.get('starts')
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

  @property
  def holes(self) -> list[str]:
    """Lines about rows that were missing when the run was started again."""
    found = [start.get('holes') for start in self.starts]
    return [hole for holes in found if isinstance(holes, list) for hole in holes if isinstance(hole, str)]

  @property
  def missing_plugins(self) -> list[str]:
    """Lines about what plugins brought to the run, and are not here to compute."""
    return [plugins.line(one) for one in plugins.missing(self.info.get('plugins'))]

  def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows where `key` is a finite number; both empty if there are none."""
    points = [(row['step'], row[key]) for row in self.rows if _number(row.get(key)) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)

  def layer_curves(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], values [N, L]) of a metric of the logged loads, thinned; both empty without any."""
    steps, values = self._layer_curves
    return steps, values[name]

  @functools.cached_property
  def _layer_curves(self):
    picks = thin(range(len(self.load_history)))  # rows are decoded one at a time: all may not fit in memory
    values = {name: np.zeros((len(picks), self.load_shape[0])) for name in metrics.METRICS}
    steps = []
    for place, row in enumerate(map(self.load_history.__getitem__, picks)):
      steps.append(row['step'])
      for name, value_NL in values.items():
        value_NL[place] = metrics.per_layer(name, row['load_LE'])
    return np.array(steps, np.int64), values

  @functools.cached_property
  def biases(self) -> list[dict[str, Any]]:
    """The rows of load_history.jsonl that have a 'bias_LE'."""
    return [self.load_history[i] for i in getattr(self.load_history, 'with_bias', ())]

  @property
  def logged_metrics(self) -> list[str]:
    """Names of metrics that are logged as NAME_batch, known here or not."""
    return [key.removesuffix('_batch') for key in self.rows[-1] if key.endswith('_batch')]

  def max_vio_floor(self, load_LE: np.ndarray) -> float | None:
    """Expected max_vio of random balanced routing of as many tokens as load_LE counts; None if it counts none."""
    top_k = self.setting('model.top_k')
    tokens = round(load_LE.sum(-1).mean() / top_k)
    return metrics.noise_floor(tokens, load_LE.shape[-1], top_k)[0] if tokens else None


def thin(values: Values) -> Values:
  """Every n-th value so that at most MAX_POINTS remain, the last one included."""
  every = math.ceil(len(values) / MAX_POINTS)
  return values[(len(values) - 1) % every :: every] if every else values


def load_run(path: str | os.PathLike) -> Run:
  """Reads a run directory.

  A last line that was cut off while being written is ignored. Where a resumed run logged steps again, the later rows
  replace the earlier ones from that step on.

  Raises:
    UserError: no such directory, config.json or metrics.jsonl missing or without rows, or a file that is no valid
      JSON, does not fit the config or was changed after it was written. A row of load_history.jsonl is looked at when
      it is read.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f'{path} is no directory; {CONTENTS}')
  info = read_json(path / 'config.json')
  if not isinstance(info.get('config'), dict):
    raise UserError(f"{path / 'config.json'} has no section 'config'; {CONTENTS}")
  try:
    json.dumps(info, indent=2, allow_nan=False)  # as summary and report will
  except (RecursionError, ValueError) as error:
    raise UserError(f'{path / "config.json"} is nested too deeply, or has numbers that are not finite') from error
  digests.check_logs(path, whole=True)
  again = not (path / digests.LOGS).exists()  # versions before it resumed without cutting
  rows = read_rows(path / 'metrics.jsonl', again)
  if not rows:
    raise UserError(f'{path / "metrics.jsonl"} has no rows: the run logged nothing yet; {CONTENTS}')
  if bad := next((row for row in rows if 'loss' not in row), None):
    raise UserError(f'{path / "metrics.jsonl"}: the row of step {bad["step"]} has no loss; {CONTENTS}')
  sample = path / 'sample.txt'
  text = read_bytes(sample, MAX_SAMPLE_BYTES).decode('utf-8', 'replace') if sample.exists() else None
  run = Run(path, info, _data(path / 'data.json'), rows, (), [], text)
  _check_settings(run)
  history = load_history.LoadHistory(path / load_history.FILE, run.load_shape, again)
  experts = load_experts(path, run.load_shape, run.setting('model.top_k'))
  evals = _evals(path / 'evals.jsonl', run.load_shape, again)
  return dataclasses.replace(run, load_history=history, experts=experts, evals=evals)


def summarize(run: Run) -> dict[str, Any]:
  """The run in one dictionary of JSON values; what was not measured is None.

  `train_loss_last_20_rows` (nats per token) is a mean over the last 20 rows, `max_vio_batch` and `drop_rate` are
  means over the last 10% of the rows, `tokens_per_s`, `model_tflop_per_s` and `mfu` are medians over all rows.
  `*_global` come from the expert loads of the last evaluation, averaged over the MoE layers and MTP modules;
  `max_vio_noise_floor` is the max_vio that random balanced routing of as many tokens would show. `train_s` is
  `step_s` times the steps since the row before, summed. Some keys are there only where they say something:
  `missing_plugins` says what was logged and cannot be computed here, `NAME_global` are further metrics as they were
  logged, `evaluated_on` is 'sample' where the run stopped before all of the validation text was evaluated, and
  `tokenizer_loses` is the share of a sample of the text that does not come back from decode(encode(text)).
  """
  last_step, last_eval = run.rows[-1]['step'], run.evals[-1] if run.evals else {}
  done, tail = run.setting('train.steps'), math.ceil(TAIL_FRACTION * len(run.rows))
  return {
    'run': run.name,
    'steps': last_step,
    'finished': last_step == done and last_eval.get('step') == done,
    'tokens': _number(run.rows[-1].get('tokens')),
    'parameters': _number(run.info.get('parameters')),
    'active_parameters': _number(run.info.get('active_parameters')),
    'train_loss_last_20_rows': _mean(run.rows[-20:], 'loss'),
    **{key: _number(last_eval.get(key)) for key in ('val_loss', 'val_perplexity', 'val_bits_per_byte')},
    **({'evaluated_on': 'sample'} if last_eval.get('set') == 'sample' else {}),
    **({'missing_plugins': missing} if (missing := run.missing_plugins) else {}),
    **({'tokenizer_loses': lost} if (lost := _number(run.data.get('tokenizer_loses'))) else {}),
    **{key: _number(run.data.get(key)) for key in ('trigram_bits_per_byte', 'gzip_bits_per_byte')},
    'corpus': run.data.get('corpus'),
    **{key: _number(run.data.get(key)) for key in ('train_bytes', 'val_bytes')},
    **_balance(run, last_eval),
    **_more_metrics(last_eval),
    **{key: _mean(run.rows[-tail:], key) for key in ('max_vio_batch', 'drop_rate')},
    **{key: _median(run.series(key)[1]) for key in ('tokens_per_s', 'model_tflop_per_s', 'mfu')},
    'train_s': _train_s(run),
    **{key: run.setting(f'balance.{key}') for key in ('bias_rule', 'aux_loss', 'gamma')},
    'seed': run.setting('train.seed'),
    'device': run.info.get('device'),
    'mesh': _mesh(run),
    'versions': run.info.get('versions'),
  }


_BALANCE = ('max_vio_global', 'max_vio_global_per_layer', 'max_vio_noise_floor', 'cv_global', 'load_entropy_global')


def _balance(run, last_eval):
  if not last_eval:
    return dict.fromkeys(_BALANCE)
  load_LE = last_eval['load_LE']
  max_vio_L = metrics.max_vio(load_LE)
  values = (
    float(max_vio_L.mean()),
    max_vio_L.tolist(),
    run.max_vio_floor(load_LE),
    float(metrics.cv(load_LE).mean()),
    float(metrics.entropy(load_LE).mean()),
  )
  return dict(zip(_BALANCE, values, strict=True))


def _more_metrics(last_eval):
  """NAME_global of the metrics that have no other place here, as they were logged."""
  found = {key: _number(value) for key, value in last_eval.items() if key.endswith('_global')}
  return {key: value for key, value in found.items() if value is not None and key not in _BALANCE}


def _mesh(run):
  sizes = [(axis, run.setting(f'mesh.{axis}')) for axis in MESH_AXES]
  return ' '.join([run.setting('mesh.preset')] + [f'{axis}={size}' for axis, size in sizes if size])


def _train_s(run):
  steps = np.array([row['step'] for row in run.rows])
  step_s = np.array([_number(row.get('step_s')) or 0.0 for row in run.rows])
  return float((np.diff(steps, prepend=0) * step_s).sum()) if step_s.any() else None


def _mean(rows, key):
  """Mean over the rows that have `key`; None if there are none or one is not finite."""
  values = [_number(row[key]) for row in rows if key in row]
  return float(np.mean(values)) if values and None not in values else None


def _median(values):
  return float(np.median(values)) if len(values) else None


def _number(value):
  return value if is_finite(value) else None


def is_finite(value: object) -> TypeGuard[float]:
  """Whether a value of JSON is a number, finite, and no larger than floats are."""
  return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _check_settings(run):
  """That config.json's settings are values in sections, and that those that the report counts with make sense."""
  sections = [section for section in run.info['config'].values() if isinstance(section, dict)]
  values = [value for section in sections for value in section.values()]
  if any(isinstance(value, dict | list) for value in values):
    raise UserError(f'{run.path / "config.json"}: each setting must be a value in a section; {CONTENTS}')
  layers, dense, experts, top_k, mtp, steps = map(run.setting, COUNTS)
  if not (0 <= dense < layers and 1 <= top_k <= experts and mtp >= 0 and steps >= 1):
    raise UserError(f'{run.path / "config.json"}: {", ".join(COUNTS)} = {list(map(run.setting, COUNTS))} cannot be')


def _data(path):
  """data.json, {} of an old run without one. Values that are not of their kind count as not measured."""
  data = read_json(path) if os.path.lexists(path) or (path.parent / digests.LOGS).exists() else {}
  if os.path.lexists(path) and not isinstance(data.get('digest'), str):
    raise UserError(f'{path} is damaged: it has no digest of the text')
  is_kind = lambda key, value: _number(value) is not None or (isinstance(value, str) and not key.endswith(MEASURED))
  return {key: value for key, value in data.items() if is_kind(key, value)}


def _evals(path, shape, again):
  rows = read_rows(path, again)
  for row in rows:
    row['load_LE'] = load_history.decode(row.get('load_LE'), shape, f'{path}, row of step {row["step"]}')
  return rows
