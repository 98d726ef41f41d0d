"""Loads in a compact form: what was written is read, also where older runs have lists, and damage is one line."""

import base64
import json
import re
import zlib

import numpy as np
import pytest

from moe.balance import load_history
from moe.balance.load_history import LoadHistory, decode, encode, rows_every
from moe.errors import UserError

SHAPE = (3, 16)
LOADS = np.random.default_rng(0).integers(0, 2**31, (5, *SHAPE))


def file_of(tmp_path, lines):
  file = tmp_path / load_history.FILE
  file.write_text(''.join(line + '\n' for line in lines))
  return file


def test_reads_what_was_written_one_row_or_a_slice(tmp_path):
  file = file_of(tmp_path, [load_history.line(10 * i, load_LE) for i, load_LE in enumerate(LOADS)])
  history = LoadHistory(file, SHAPE)
  assert (len(history), history.steps) == (5, [0, 10, 20, 30, 40])
  np.testing.assert_array_equal([row['load_LE'] for row in history], LOADS)
  assert [row['step'] for row in history[:-4:-1]] == [40, 30, 20]
  np.testing.assert_array_equal(history[-2]['load_LE'], LOADS[3])
  assert history[0]['load_LE'].dtype == np.int64
  assert list(LoadHistory(tmp_path / 'none', SHAPE)) == []


def test_reads_rows_of_older_runs_among_newer_ones(tmp_path):
  lists = [json.dumps({'step': 0, 'load_LE': LOADS[0].tolist()})]
  lists += [json.dumps({'load_LE': LOADS[1].tolist(), 'step': 1}, separators=(',', ':'))]
  history = LoadHistory(file_of(tmp_path, [*lists, load_history.line(2, LOADS[2])]), SHAPE)
  np.testing.assert_array_equal([row['load_LE'] for row in history], LOADS[:3])


def test_later_rows_count_and_a_cut_one_does_not(tmp_path):
  file = file_of(tmp_path, [load_history.line(step, LOADS[i]) for i, step in enumerate((1, 2, 3, 2))])
  with file.open('a') as end:
    end.write(load_history.line(3, LOADS[4])[:40])
  history = LoadHistory(file, SHAPE)
  assert history.steps == [1, 2]
  np.testing.assert_array_equal(history[1]['load_LE'], LOADS[3])


def test_a_row_of_v3_takes_a_third_of_its_numbers():
  load_LE = np.random.default_rng(0).multinomial(15360 * 4096 * 8, np.full(256, 1 / 256), 59)
  as_numbers = len(json.dumps({'step': 1, 'load_LE': load_LE.tolist()}))
  assert as_numbers > 120_000
  assert len(load_history.line(1, load_LE)) < 0.4 * as_numbers


@pytest.mark.parametrize(
  ('log_every', 'steps', 'every'), [(1, 400, 1), (1, 2000, 1), (1, 2001, 2), (10, 30_000, 20), (1, 235_240, 118)]
)
def test_a_run_that_does_not_say_makes_some_2000_rows(log_every, steps, every):
  assert rows_every(log_every, steps) == every
  assert steps / every <= load_history.MOST_ROWS


def packed(data):
  return base64.b64encode(data).decode()


@pytest.mark.parametrize(
  'value',
  [
    None,
    7,
    True,
    {},
    [],
    [[]],
    [1] * 16,
    [[1] * 16] * 2,
    [[1] * 15, *[[1] * 16] * 2],
    [[1.5] * 16] * 3,
    [[-1] * 16] * 3,
    [['1'] * 16] * 3,
    [[10**30] * 16] * 3,
    [[2**63] * 16] * 3,
    '',
    'no base64!',
    packed(b'not zlib'),
    packed(zlib.compress(b'\1' * (4 * 48))[:-3]),
    packed(zlib.compress(b'\1' * (4 * 47))),
    packed(zlib.compress(b'\1' * (4 * 49))),
    packed(zlib.compress(b'\1' * (4 * 48 - 1))),
    packed(zlib.compress(b'\0' * (1 << 24))),
    packed(zlib.compress(b'\xff' * (4 * 48))),
  ],
)
def test_what_are_no_loads_is_refused(value):
  with pytest.raises(UserError, match=r'^row 5.*load_LE') as caught:
    decode(value, SHAPE, 'row 5')
  assert len(str(caught.value)) < 300


@pytest.mark.parametrize('line', ['[1]', '\0\0', '{"load_LE": ""}', '{"step": -1}', '{"step": "1"}', '', '[' * 99_999])
def test_a_damaged_line_is_named(tmp_path, line):
  lines = [load_history.line(1, LOADS[0]), line, load_history.line(3, LOADS[1])]
  with pytest.raises(UserError, match='line 2'):
    LoadHistory(file_of(tmp_path, lines), SHAPE)


def test_a_row_that_is_damaged_inside_is_named_when_it_is_read(tmp_path):
  line = re.sub('load_LE": "....', 'load_LE": "????', load_history.line(2, LOADS[0]))
  history = LoadHistory(file_of(tmp_path, [load_history.line(1, LOADS[0]), line]), SHAPE)
  assert history[0]['step'] == 1
  with pytest.raises(UserError, match='line 2: load_LE is damaged'):
    history[1]


def test_round_trip_of_extremes():
  load_LE = np.zeros(SHAPE, np.int64)
  load_LE[0, 0] = 2**31 - 1
  np.testing.assert_array_equal(decode(encode(load_LE), SHAPE, ''), load_LE)
