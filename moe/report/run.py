"""Reads a run directory and sums it up."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from moe.balance import metrics
from moe.errors import UserError
from moe.files import write_atomically
from moe.report import html

TAIL_FRACTION = 0.1  # last fraction of the rows behind the summary's training means
CONTENTS = (
  'a run directory holds config.json and metrics.jsonl, and as far as the run got data.json, load_history.jsonl, '
  'evals.jsonl and sample.txt'
)
MESH_AXES = ('pipe', 'data', 'expert', 'tensor')


@dataclasses.dataclass(frozen=True)
class Run:
  """The files of one run directory. Rows are in ascending order of their 'step'."""

  path: pathlib.Path
  info: dict[str, Any]  # config.json: 'config', 'versions', 'command', 'device', 'parameters', 'active_parameters'
  data: dict[str, Any]  # data.json; {} if there is none
  rows: list[dict[str, Any]]  # metrics.jsonl, at least one row
  load_history: list[dict[str, Any]]  # load_history.jsonl, 'load_LE' as int64 [L, E]
  evals: list[dict[str, Any]]  # evals.jsonl, 'load_LE' as int64 [L, E]
  sample: str | None  # sample.txt

  @property
  def name(self) -> str:
    return self.path.resolve().name

  def setting(self, key: str) -> Any:
    """Value of a config key such as 'model.top_k'. Raises UserError if config.json lacks it."""
    value = self.info['config']
    for part in key.split('.'):
      if not isinstance(value, dict) or part not in value:
        raise UserError(f'{self.path / "config.json"} has no setting {key!r}; {CONTENTS}')
      value = value[part]
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

  def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows where `key` is a finite number; both empty if there are none."""
    points = [(row['step'], row[key]) for row in self.rows if _number(row.get(key)) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)

  def max_vio_floor(self, load_LE: np.ndarray) -> float | None:
    """Expected max_vio of random balanced routing of as many tokens as load_LE counts; None if it counts none."""
    top_k = self.setting('model.top_k')
    tokens = round(load_LE.sum(-1).mean() / top_k)
    return metrics.noise_floor(tokens, load_LE.shape[-1], top_k)[0] if tokens else None


def load_run(path: str | os.PathLike) -> Run:
  """Reads a run directory.

  A last line that was cut off while being written is ignored. Where a resumed run logged steps again, the later rows
  replace the earlier ones from that step on.

  Raises:
    UserError: no such directory, config.json or metrics.jsonl missing or without rows, or a file that is no valid
      JSON or does not fit the config.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f'{path} is no directory; {CONTENTS}')
  info = _read_json(path / 'config.json')
  if not isinstance(info.get('config'), dict):
    raise UserError(f"{path / 'config.json'} has no section 'config'; {CONTENTS}")
  rows = _read_jsonl(path / 'metrics.jsonl', ('loss',))
  if not rows:
    raise UserError(f'{path / "metrics.jsonl"} has no rows: the run logged nothing yet; {CONTENTS}')
  data_path, sample_path = path / 'data.json', path / 'sample.txt'
  run = Run(
    path=path,
    info=info,
    data=_read_json(data_path) if data_path.exists() else {},
    rows=rows,
    load_history=_read_optional_jsonl(path / 'load_history.jsonl', ('load_LE',)),
    evals=_read_optional_jsonl(path / 'evals.jsonl', ('load_LE',)),
    sample=sample_path.read_text('utf-8', errors='replace') if sample_path.exists() else None,
  )
  _check_loads(run, 'load_history.jsonl', run.load_history)
  _check_loads(run, 'evals.jsonl', run.evals)
  return run


def summarize(run: Run) -> dict[str, Any]:
  """The run in one dictionary of JSON values; what was not measured is None.

  `train_loss_last_20_rows` (nats per token) is a mean over the last 20 rows, `max_vio_batch` and `drop_rate` are
  means over the last 10% of the rows, `tokens_per_s`, `model_tflop_per_s` and `mfu` are medians over all rows.
  `*_global` come from the expert loads of the last evaluation, averaged over the MoE layers and MTP modules;
  `max_vio_noise_floor` is the max_vio that random balanced routing of as many tokens would show. `train_s` is
  `step_s` times the steps since the row before, summed. Two keys are there only where they say something:
  `evaluated_on` is 'sample' where the run stopped before all of the validation text was evaluated, and
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
    **({'tokenizer_loses': lost} if (lost := _number(run.data.get('tokenizer_loses'))) else {}),
    **{key: _number(run.data.get(key)) for key in ('trigram_bits_per_byte', 'gzip_bits_per_byte')},
    'corpus': run.data.get('corpus'),
    **{key: _number(run.data.get(key)) for key in ('train_bytes', 'val_bytes')},
    **_balance(run, last_eval),
    **{key: _mean(run.rows[-tail:], key) for key in ('max_vio_batch', 'drop_rate')},
    **{key: _median(run.series(key)[1]) for key in ('tokens_per_s', 'model_tflop_per_s', 'mfu')},
    'train_s': _train_s(run),
    **{key: run.setting(f'balance.{key}') for key in ('bias_rule', 'aux_loss', 'gamma')},
    'seed': run.setting('train.seed'),
    'device': run.info.get('device'),
    'mesh': _mesh(run),
    'versions': run.info.get('versions'),
  }


def write_report(path: str | os.PathLike) -> dict[str, Any]:
  """Writes `summary.json` and `report.html` into run directory `path`, each in one move, and returns the summary.

  Raises:
    UserError: the directory cannot be read as a run (see `load_run`) or not be written to.
  """
  run = load_run(path)
  summary = summarize(run)
  write_atomically(run.path / 'summary.json', json.dumps(summary, indent=2, allow_nan=False) + '\n')
  write_atomically(run.path / 'report.html', html.page(run, summary))
  return summary


def _balance(run, last_eval):
  keys = ('max_vio_global', 'max_vio_global_per_layer', 'max_vio_noise_floor', 'cv_global', 'load_entropy_global')
  if not last_eval:
    return dict.fromkeys(keys)
  load_LE = last_eval['load_LE']
  max_vio_L = metrics.max_vio(load_LE)
  values = (
    float(max_vio_L.mean()),
    max_vio_L.tolist(),
    run.max_vio_floor(load_LE),
    float(metrics.cv(load_LE).mean()),
    float(metrics.entropy(load_LE).mean()),
  )
  return dict(zip(keys, values, strict=True))


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
  return value if isinstance(value, int | float) and math.isfinite(value) else None


def _read_json(path):
  try:
    value = json.loads(path.read_bytes())
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}; {CONTENTS}') from error
  except ValueError as error:
    raise UserError(f'{path} is no valid JSON ({error}); {CONTENTS}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds no JSON object; {CONTENTS}')
  return value


def _read_optional_jsonl(path, required):
  return _read_jsonl(path, required) if path.exists() else []


def _read_jsonl(path, required):
  """Rows with an int 'step' and the `required` keys; 'load_LE' becomes an array as it is read, which saves memory."""
  try:
    lines = path.read_bytes().rstrip().split(b'\n')
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}; {CONTENTS}') from error
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      if number == len(lines):
        break  # cut off while being written
      raise UserError(f'{path} line {number} is no valid JSON ({error}); {CONTENTS}') from error
    row = _checked(row, required, f'{path} line {number}')
    while rows and rows[-1]['step'] >= row['step']:  # the run was resumed from an earlier step
      rows.pop()
    rows.append(row)
  return rows


def _checked(row, required, where):
  if not isinstance(row, dict) or not isinstance(row.get('step'), int) or any(key not in row for key in required):
    raise UserError(f'{where} must be an object with an integer step and {", ".join(required)}; {CONTENTS}')
  if 'load_LE' in required:
    try:
      row['load_LE'] = np.array(row['load_LE'], np.int64)
    except (TypeError, ValueError) as error:
      raise UserError(f'{where}: load_LE must be counts, layers by experts') from error
  return row


def _check_loads(run, name, rows):
  for row in rows:
    shape = row['load_LE'].shape
    if shape != run.load_shape:
      raise UserError(
        f'{run.path / name}: load_LE of step {row["step"]} has shape {shape}, but by config.json it is {run.load_shape}'
      )
