"""Files that other hands wrote: each kind of damage is one line that names the file."""

import contextlib
import json
import os

import pytest

from moe.errors import UserError
from moe.files import MAX_JSON_BYTES, read_bytes, read_json, read_rows, write_json


def test_reads_what_is_there(tmp_path):
  file = tmp_path / 'a.json'
  file.write_text('{"a": [1, 2]}')
  assert read_json(file) == {'a': [1, 2]}
  assert read_bytes(file, 13) == b'{"a": [1, 2]}'


@pytest.mark.parametrize(
  ('text', 'why'),
  [
    (b'', 'no valid JSON'),
    (b'{"a": 1', 'no valid JSON'),
    (b'\0' * 64, 'no valid JSON'),
    (b'\xff\xfe{}', 'no valid JSON'),
    (b'[1]', 'no JSON object, but list'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"a":' * 100_000, 'nested too deeply'),
    (b'{"a": ' + b'1' * 5000 + b'}', 'no valid JSON'),
  ],
)
def test_damaged_json_is_named(tmp_path, text, why):
  file = tmp_path / 'a.json'
  file.write_bytes(text)
  with pytest.raises(UserError, match=why) as caught:
    read_json(file)
  assert str(file) in str(caught.value)


@pytest.mark.parametrize('indent', [1, 2])
def test_any_changed_byte_of_sealed_json_is_noticed(tmp_path, indent):
  file, value = tmp_path / 'a.json', {'a': [1, 2.5], 'b': {'c': 'x'}, 'd': True}
  write_json(file, value, indent)
  assert read_json(file) == value
  text = file.read_bytes()
  for i in range(len(text)):
    file.write_bytes(text[:i] + bytes([text[i] ^ 1]) + text[i + 1 :])
    with contextlib.suppress(UserError):
      assert value.items() <= read_json(file).items(), 'only the name of the seal may be broken'
  parsed = json.loads(text)
  file.write_text(json.dumps(parsed | {'d': False}, indent=indent))
  with pytest.raises(UserError, match='delete its crc32 if the change is meant'):
    read_json(file)
  del parsed['crc32']
  file.write_text(json.dumps(parsed | {'d': False}))
  assert read_json(file) == value | {'d': False}


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
  file, synced, fsync = tmp_path / 'a.json', [], os.fsync
  monkeypatch.setattr(os, 'fsync', lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))
  monkeypatch.setattr(os, 'replace', lambda old, new: (synced.index(old.stat().st_ino), os.rename(old, new)))
  write_json(file, {'a': 1})
  assert read_json(file) == {'a': 1}


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with (tmp_path / 'huge').open('wb') as huge:
    huge.truncate(MAX_JSON_BYTES + 1)  # takes no room on the disk
  for path, why in (
    (tmp_path / 'pipe', 'a pipe or device'),
    (tmp_path, 'a folder'),
    (tmp_path / 'huge', 'at most'),
    (tmp_path / 'missing', 'No such file'),
    (tmp_path / ('x' * 300), 'File name too long'),
    (tmp_path / 'nul\0', 'null (byte|character)'),
  ):
    with pytest.raises(UserError, match=why):
      read_json(path)


def test_rows_of_a_run(tmp_path):
  file = tmp_path / 'rows.jsonl'
  assert read_rows(file) == []
  file.write_bytes(b'{"step": 1}\n{"step": 2, "a": 1}\n{"step": 3}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
  assert read_rows(file) == [{'step': 1}, {'step': 2, 'a': 2}]


@pytest.mark.parametrize('line', [b'{"step": 2}', b'{"step": 1}'])
def test_rows_out_of_order_are_refused_where_no_row_is_logged_again(tmp_path, line):
  file = tmp_path / 'rows.jsonl'
  file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + line + b'\n{"step": 4}\n')
  with pytest.raises(UserError, match=r'line 3 has step \d, which is not after the row before'):
    read_rows(file, again=False)
  assert read_rows(file)[-1] == {'step': 4}


@pytest.mark.parametrize('line', [b'\0\0\0', b'[1]', b'{}', b'{"step": "2"}', b'{"step": -1}', b'{"step": true}', b''])
def test_a_damaged_row_is_named(tmp_path, line):
  file = tmp_path / 'rows.jsonl'
  file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
  with pytest.raises(UserError, match='line 2'):
    read_rows(file)
