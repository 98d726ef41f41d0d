"""Reports of fake run directories that are not whole: what disks and editors do to a run."""

import json
import os
import re

import pytest
from fake_run import write_json, write_run

from moe.errors import UserError
from moe.report import figures, html
from moe.report.html import write_report
from moe.report.run import load_run, summarize


@pytest.fixture
def run_dir(tmp_path):
  return write_run(tmp_path / 'fake')


def bad_line(path):
  lines = (path / 'metrics.jsonl').read_text().splitlines()
  (path / 'metrics.jsonl').write_text('\n'.join([lines[0], lines[1][:20], *lines[2:]]))


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda path: (path / 'config.json').unlink(), 'config.json'),
    (lambda path: (path / 'config.json').write_text('{"config"'), 'config.json is no valid JSON'),
    (lambda path: (path / 'config.json').write_text('{"config": {"model": {}}}'), "no setting 'model.num_layers'"),
    (lambda path: (path / 'metrics.jsonl').unlink(), 'metrics.jsonl'),
    (lambda path: (path / 'metrics.jsonl').write_text(''), 'metrics.jsonl has no rows'),
    (lambda path: (path / 'metrics.jsonl').write_text('{"step": 1}\n'), 'the row of step 1 has no loss'),
    (bad_line, 'metrics.jsonl line 2 is no valid JSON'),
    (
      lambda path: (path / 'evals.jsonl').write_text('{"step": 1, "load_LE": [[1, 2]]}\n'),
      r'step 1: load_LE has shape \(1, 2\)',
    ),
    (lambda path: (path / 'report.html').mkdir(), r'cannot write .*report\.html'),
  ],
)
def test_bad_directories(run_dir, spoil, message):
  spoil(run_dir)
  with pytest.raises(UserError, match=message) as caught:
    write_report(run_dir)
  assert '\n' not in str(caught.value)


def test_no_directory(tmp_path):
  with pytest.raises(UserError, match=r'nowhere is no directory; a run directory holds config\.json'):
    load_run(tmp_path / 'nowhere')


DEEP = '[' * 600 + ']' * 600  # read as JSON, but not to be written again
LARGE = '1' + '0' * 400  # an integer, but no float
VALUES = ('null', '"x"', '[1]', '{"a": 1}', 'true', LARGE, 'NaN', '-1', '1e999', DEEP)


def spoiled(path, name, keys, value):
  """Sets fields of the last line of a file to some JSON text."""
  *lines, last = path.joinpath(name).read_text().splitlines()
  row = json.loads(last)
  for key in keys:
    target, (*sections, field) = row, key.split('.')
    for section in sections:
      target = target[section]
    target[field] = 'PLACE'
  path.joinpath(name).write_text('\n'.join([*lines, json.dumps(row).replace('"PLACE"', value)]) + '\n')


@pytest.fixture
def small(tmp_path):
  return write_run(tmp_path / 'small', num_layers=2, num_experts=4, top_k=2, steps=6, history_every=3)


@pytest.mark.parametrize('value', VALUES, ids=lambda value: value[:8])
def test_measurements_of_another_kind_count_as_not_measured(small, value, monkeypatch):
  rates = ('drop_rate', 'tokens_per_s', 'bias_min', 'bias_max', 'gate_entropy', 'grad_norm', 'learning_rate')
  spoiled(small, 'metrics.jsonl', ('loss', 'tokens', 'step_s', 'max_vio_batch', *rates), value)
  spoiled(small, 'evals.jsonl', ('val_loss', 'val_perplexity', 'val_bits_per_byte'), value)
  spoiled(small, 'data.json', ('corpus', 'train_bytes', 'val_bytes', 'train_tokens', 'gzip_bits_per_byte'), value)
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')  # drawn, but not rendered
  summary = write_report(small)
  json.dumps(summary, allow_nan=False)
  if value not in ('true', '-1'):  # these are numbers
    for key in ('tokens', 'train_loss_last_20_rows', 'val_loss', 'gzip_bits_per_byte', 'train_bytes'):
      assert summary[key] is None


def test_an_emptied_data_json_is_refused(small):
  (small / 'data.json').write_text('{}')
  with pytest.raises(UserError, match=r'data\.json is damaged: it has no digest'):
    write_report(small)


@pytest.mark.parametrize(
  ('name', 'key'),
  [
    *[(name, 'step') for name in ('metrics.jsonl', 'evals.jsonl', 'load_history.jsonl')],
    *[(name, 'load_LE') for name in ('evals.jsonl', 'load_history.jsonl')],
    *[('config.json', f'config.model.{key}') for key in ('num_layers', 'num_experts', 'top_k', 'mtp_depth')],
    *[('config.json', f'config.{key}') for key in ('train.steps', 'balance.bias_rule')],
  ],
)
def test_what_a_report_cannot_do_without_is_refused_by_name(small, name, key):
  whole, fits = (small / name).read_text(), {'config.balance.bias_rule': '"x"', 'config.train.steps': LARGE}

  def read():
    run = load_run(small)
    return summarize(run), list(run.load_history)

  for value in VALUES:
    if value == fits.get(key):
      continue
    spoiled(small, name, [key], value)
    with pytest.raises(UserError, match=rf'{re.escape(name)}|is nested too deeply') as caught:
      read()
    assert '\n' not in str(caught.value)
    (small / name).write_text(whole)


@pytest.mark.parametrize('key', ['parameters', 'versions', 'device', 'command', 'starts', 'config.train.seed'])
def test_what_config_json_says_besides_is_shown_or_refused(small, key, monkeypatch):
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')
  whole = (small / 'config.json').read_text()
  for value in VALUES:
    spoiled(small, 'config.json', [key], value)
    try:
      run = load_run(small)
      summary = summarize(run)
    except UserError:
      assert value in ('NaN', '1e999', DEEP) or key == 'config.train.seed'
    else:
      json.dumps(summary, indent=2, allow_nan=False)
      html.page(run, summary) if value == 'null' else run.holes
    (small / 'config.json').write_text(whole)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'evals.jsonl', 'load_history.jsonl'])
def test_a_damaged_line_is_named(small, name):
  *lines, last = (small / name).read_bytes().splitlines()
  for damage in (b'', b'\0' * 50, b'[1]', b'{}', b'"x"', b'[' * 99_999, b'{"a":' * 99_999, b'\xff\xfe'):
    (small / name).write_bytes(b'\n'.join([*lines, damage, last]) + b'\n')
    with pytest.raises(UserError, match=rf'{re.escape(name)} line {len(lines) + 1} '):
      load_run(small)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'evals.jsonl', 'load_history.jsonl', 'data.json', 'sample.txt'])
def test_only_regular_files_are_read(small, name):
  (small / name).unlink()
  os.mkfifo(small / name)
  with pytest.raises(UserError, match='a pipe or device'):
    load_run(small)


def test_starts_and_missing_rows_are_shown(small, monkeypatch):
  info, hole = json.loads((small / 'config.json').read_text()), 'metrics.jsonl ends at step <5>'
  write_json(small / 'config.json', info | {'starts': [{'step': 0}, {'step': 8, 'holes': [hole, 7]}, 'x']})
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')
  write_report(small)
  page = (small / 'report.html').read_text()
  assert 'Missing rows: metrics.jsonl ends at step &lt;5&gt;.' in page
  assert '&quot;step&quot;: 8' in page
