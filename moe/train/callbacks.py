"""Who is told of a run as it goes: what a program or a service beside the run's own files wants to know.

docs/howto/callbacks.md has an example. A logger is one that `train.logger` names.
"""

import abc
import dataclasses
import importlib
import os
import re
import time
from typing import TYPE_CHECKING

from moe.config import Config
from moe.errors import UserError, one_line
from moe.files import read_json, write_json
from moe.train.logbook import numbers

if TYPE_CHECKING:
  from moe.train.loop import Run

FILE = 'logger.json'  # in the run's folder: which run of the service goes on


class Callback:
  """Is told of a run as it goes, in every process, after the run's own rows are written; does nothing by itself."""

  def logged(self, run: 'Run', row: dict) -> None:
    """After a row of metrics.jsonl; `row` as it stands there."""

  def evaluated(self, run: 'Run', row: dict) -> None:
    """After a row of evals.jsonl; `row` as it stands there."""

  def finished(self, run: 'Run') -> bool:
    """After the last step and evaluation. False: a signal came (`run.stop()`), and the same command is to go on."""
    return True

  def closed(self, run: 'Run') -> None:
    """When the run ends, however it does: finished, by a signal or by an error."""


class Logger(Callback, abc.ABC):
  """Sends the numbers of all rows to a service, from the first process. What fails there ends no run: it is said once.

  A subclass says how to `start` and to `send`. What has an id in the run's folder is gone on with.
  """

  package: str

  def __init__(self, say):
    """Args: `say`, one line to the user. Raises UserError if the package is missing."""
    try:
      self.module = importlib.import_module(self.package)
    except ImportError as error:
      raise UserError(
        f'config train.logger = {self.package!r} needs a package that is not there ({error}); run: pip install '
        f'{self.package}'
      ) from error
    self._say, self._started, self._failed = say, False, False

  @abc.abstractmethod
  def start(self, run: 'Run', id: str | None) -> str:
    """Begins a run of the service, or goes on with that of this id; its id."""

  @abc.abstractmethod
  def send(self, values: dict[str, float], step: int) -> None:
    """Tells it the numbers of a row."""

  def stop(self) -> None:  # most have nothing to do
    """No more will come."""

  def logged(self, run: 'Run', row: dict) -> None:
    self._guarded(run, lambda: self.send(dict(numbers(row)), row['step']))

  def evaluated(self, run: 'Run', row: dict) -> None:
    self.logged(run, row)

  def closed(self, run: 'Run') -> None:
    if self._started:
      self._guarded(run, self.stop)

  def _guarded(self, run, action):
    if not run.logbook or self._failed:
      return
    try:
      if not self._started:
        file = run.path / FILE
        id = read_json(file).get(self.package) if file.exists() else None
        write_json(file, {self.package: self.start(run, id)})
        self._started = True
      action()
    except Exception as error:  # of a network, of a service, of one of dozens of packages
      self._failed = True
      self._say(f'{self.package} fails, and is told no more of this run: {type(error).__name__}: {one_line(error)}')


class WandB(Logger):
  """https://docs.wandb.ai; its own environment variables say where to and as whom: WANDB_PROJECT, WANDB_MODE, ..."""

  package = 'wandb'

  def start(self, run: 'Run', id: str | None) -> str:
    self._run = self.module.init(
      project=os.environ.get('WANDB_PROJECT', 'moe-lossfree'),
      name=run.path.resolve().name,
      id=id,
      resume='allow',
      dir=str(run.path),
      config=dataclasses.asdict(run.given),
    )
    return self._run.id

  def send(self, values: dict[str, float], step: int) -> None:
    self._run.log(values, step=step)

  def stop(self) -> None:
    self._run.finish()


class MLflow(Logger):
  """https://mlflow.org; its own environment variables say where to: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

  package = 'mlflow'
  BATCH = 100  # parameters that one request may hold

  def start(self, run: 'Run', id: str | None) -> str:
    self._client = self.module.MlflowClient()
    if id is None:
      name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'moe-lossfree')
      experiment = self._client.get_experiment_by_name(name)
      experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
      id = self._client.create_run(experiment_id, run_name=run.path.resolve().name).info.run_id
      settings = {key: part for key, part in dataclasses.asdict(run.given).items() if isinstance(part, dict)}
      flat = {f'{key}.{name}': value for key, part in settings.items() for name, value in part.items()}
      params = [self.module.entities.Param(key, str(value)[:500]) for key, value in flat.items()]
      for first in range(0, len(params), self.BATCH):
        self._client.log_batch(id, params=params[first : first + self.BATCH])
    else:
      self._client.update_run(id, status='RUNNING')
    self._id = id
    return id

  def send(self, values: dict[str, float], step: int) -> None:
    now = int(time.time() * 1000)
    names = {key: _as_path(key) for key in values}
    metrics = [self.module.entities.Metric(names[key], float(value), now, step) for key, value in values.items()]
    self._client.log_batch(self._id, metrics=metrics)

  def stop(self) -> None:
    self._client.set_terminated(self._id)


def _as_path(key):
  """A tag as MLflow takes it: it keeps each in a file of that name. Those of sources may hold anything."""
  parts = [re.sub(r'[^\w\-. ]', '_', part) for part in key.split('/')]
  return '/'.join(part if part.strip('.') else '_' * len(part) for part in parts if part)


LOGGERS = {logger.package: logger for logger in (WandB, MLflow)}


def loggers(config: Config, say) -> list[Callback]:
  """The logger that train.logger names, in the first process. Raises UserError if its package is missing."""
  name = config.train.logger
  return [LOGGERS[name](say)] if name != 'none' and not config.mesh.process_id else []
