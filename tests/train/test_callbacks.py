"""Loggers, told of a run by a stand-in for its service, and MLflow itself where it is installed."""

import dataclasses
import sys
import types

import pytest

from moe.config import Config, TrainConfig
from moe.errors import UserError
from moe.files import read_json
from moe.train import callbacks

ROWS = [{'step': 1, 'loss': 2.5, 'tokens': 7}, {'step': 2, 'loss': 2.0, 'tokens': 9}]
EVALUATION = {'step': 2, 'set': 'full', 'val_loss': 1.5, 'load_LE': [[1]], 'source_loss': {'a$/': 1.25, './': 0.5}}


def a_run(path, logbook=True):
  path.mkdir(exist_ok=True)
  return types.SimpleNamespace(path=path, logbook=logbook, given=Config())


class FakeRun:
  def __init__(self, arguments):
    self.arguments, self.sent, self.ended, self.id = arguments, [], False, arguments['id'] or 'abc'

  def log(self, values, step):
    self.sent.append((step, values))

  def finish(self):
    self.ended = True


@pytest.fixture
def wandb(monkeypatch):
  """A module `wandb` that remembers its runs."""
  runs = []
  init = lambda **arguments: runs.append(FakeRun(arguments)) or runs[-1]
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init, runs=runs))
  return runs


def logger(name, said):
  (made,) = callbacks.loggers(Config(train=TrainConfig(logger=name)), said.append)
  return made


def tell(made, run):
  for row in ROWS:
    made.logged(run, row)
  made.evaluated(run, EVALUATION)
  assert made.finished(run)
  made.closed(run)


def test_wandb_is_told_all_numbers(wandb, tmp_path):
  said = []
  tell(logger('wandb', said), a_run(tmp_path / 'mine'))
  (run,) = wandb
  assert run.sent[:2] == [(row['step'], {key: row[key] for key in ('loss', 'tokens')}) for row in ROWS]
  assert run.sent[2] == (2, {'full/val_loss': 1.5, 'source_loss/a$/': 1.25, 'source_loss/./': 0.5})
  assert run.ended
  assert (run.arguments['name'], run.arguments['project']) == ('mine', 'moe-lossfree')
  assert run.arguments['config'] == dataclasses.asdict(Config())
  assert not said
  tell(logger('wandb', said), a_run(tmp_path / 'mine'))
  assert [run.arguments['id'] for run in wandb] == [None, 'abc'], 'the same run goes on'


def test_other_processes_tell_nothing(wandb, tmp_path):
  tell(logger('wandb', []), a_run(tmp_path / 'mine', logbook=None))
  assert not wandb
  other = dataclasses.replace(Config().mesh, process_id=1)
  assert callbacks.loggers(Config(train=TrainConfig(logger='wandb'), mesh=other), print) == []


def test_a_service_that_fails_ends_no_run(wandb, tmp_path, monkeypatch):
  def log(*_, **__):
    raise ConnectionError('no\nroute')

  monkeypatch.setattr(FakeRun, 'log', log)
  said = []
  tell(logger('wandb', said), a_run(tmp_path / 'mine'))
  assert said == ['wandb fails, and is told no more of this run: ConnectionError: no route']


def test_off_by_default():
  assert callbacks.loggers(Config(), print) == []


@pytest.mark.parametrize('name', callbacks.LOGGERS)
def test_a_missing_package_is_one_line(name, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match=f"train.logger = '{name}' needs a package .*; run: pip install {name}$"):
    logger(name, [])


def test_mlflow_keeps_them_in_a_folder(tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', (tmp_path / 'mlruns').as_uri())
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')  # or mlflow-skinny could keep nothing without a server
  said, run = [], a_run(tmp_path / 'mine')
  tell(logger('mlflow', said), run)
  tell(logger('mlflow', said), run)
  assert not said
  id = read_json(run.path / callbacks.FILE)['mlflow']
  found = mlflow.MlflowClient().get_run(id)
  assert (found.info.status, found.info.run_name) == ('FINISHED', 'mine')
  assert found.data.metrics == {
    'loss': 2.0,
    'tokens': 9,
    'full/val_loss': 1.5,
    'source_loss/a_': 1.25,
    'source_loss/_': 0.5,
  }
  assert found.data.params['balance.bias_rule'] == 'sign'
