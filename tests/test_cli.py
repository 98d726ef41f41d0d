"""How every script ends: one line for a mistake, none for a reader that has gone or for Ctrl-C; and its settings."""

import dataclasses
import os
import pathlib
import pwd
import re
import signal
import subprocess
import sys

import pytest
from absl import flags

from moe import cli
from moe.config import KINDS, Config
from moe.errors import MOST_CHARACTERS, UserError, one_line
from moe.files.paths import local_path

ROOT = pathlib.Path(__file__).parents[1]


def test_a_line_of_error_keeps_its_beginning_and_its_end():
  assert one_line('two\n  lines') == 'two lines'
  long = one_line('path ' + 'x' * 5000 + ' must be shorter')
  assert len(long) == MOST_CHARACTERS
  assert long.startswith('path xxx')
  assert ' ... ' in long
  assert long.endswith('x must be shorter')
  assert one_line('x' * MOST_CHARACTERS) == 'x' * MOST_CHARACTERS


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
  'text',
  ['gs://bucket/run', 's3://bucket/run', 'gs:/bucket/run', 'file:///tmp/x', 'hdfs://h:1/x', pathlib.Path('gs://b')],
)
def test_addresses_are_no_paths(text):
  with pytest.raises(UserError, match=r'^--workdir = .* is an address; only paths of this machine work'):
    local_path(text, '--workdir')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('~no-such-user/x', 'give the path without ~'),
    ('x' * 300, 'File name too long'),
    ('a\0b', 'null (byte|character)'),
  ],
)
def test_paths_that_cannot_be(text, message):
  with pytest.raises(UserError, match=f'^--out = .*{message}'):
    local_path(text, '--out')


def test_paths_that_can_be(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert local_path('~/x', 'x') == tmp_path / 'x'
  for text in ('runs/a,b=1', 'a:b', str(tmp_path), 'C:x', 'no/such'):
    assert local_path(text, 'x') == pathlib.Path(text)


def test_no_home(monkeypatch):
  monkeypatch.delenv('HOME')
  monkeypatch.setattr(pwd, 'getpwuid', lambda _: {}['no such uid'])
  with pytest.raises(UserError, match=r'home directory.*give the path without ~'):
    local_path('~/run', '--workdir')


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.fixture
def config_of():
  """config_of(*arguments): the Config that a script with these arguments would use."""
  known = set(flags.FLAGS)
  config = cli.define_config('tiny')

  def config_of(*arguments):
    rest = cli._parse_flags(['script', *map(str, arguments)])
    assert rest == ['script']
    return config()

  yield config_of
  for flag in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, flag)
  flags.FLAGS.unparse_flags()


def test_the_default_config_is_found_from_anywhere(config_of, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny').mkdir()  # as in runs/, where the demo's run has its config's name
  assert config_of().model.d_ff == 384
  assert config_of().balance.gamma == 0.003


def test_settings_of_the_command_line(config_of, tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text('def get_config(arg="x"):\n  return {"train": {"sample_prompt": arg}, "model": {"mtp_depth": 0}}')
  given = (
    '--config.train.steps=7',
    '--config.optimizer.eps',
    '1e-6',
    '--config.data.paths=a,b',
    '--config.dispatch=local',
  )
  config = config_of(*given, f'--config={file}', '--config.model.tie_embeddings')
  want = Config()
  want = dataclasses.replace(want, dispatch='local', data=dataclasses.replace(want.data, paths='a,b'))
  want = dataclasses.replace(want, model=dataclasses.replace(want.model, mtp_depth=0, tie_embeddings=True))
  want = dataclasses.replace(want, optimizer=dataclasses.replace(want.optimizer, eps=1e-6))
  assert config == dataclasses.replace(want, train=dataclasses.replace(want.train, steps=7, sample_prompt='x'))
  assert config_of(f'--config={file}:y=1:2').train.sample_prompt == 'y=1:2'


def test_a_run_may_have_the_name_of_a_config(config_of, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  want = config_of('--config=tiny')
  (tmp_path / 'tiny').mkdir()  # --workdir=tiny, at its second start
  assert config_of('--config=tiny') == want
  (tmp_path / 'h200').write_text('def get_config(arg=""): return {"train": {"steps": 7}}')  # a file, however, is meant
  assert config_of('--config=h200').train.steps == 7


def test_every_setting_has_a_flag(config_of):
  assert {f'config.{key}' for key in KINDS} < set(flags.FLAGS)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.optimizer.lr=1'], 'unknown setting --config.optimizer.lr; .* is --config.optimizer.learning_rate$'),
    (['--config.lr=1'], 'nearest valid one is --config.optimizer.learning_rate$'),
    (['--config.steps', '1'], 'nearest valid one is --config.train.steps$'),
    (['--config.model.num_expert=8'], 'nearest valid one is --config.model.num_experts$'),
    (['--noconfig.model.tied=1'], 'unknown setting --config.model.tied; the nearest valid one is --config.model.tie'),
    (['--config.train.steps=many'], "config train.steps = 'many' must be of type int"),
    (['--config.train.steps=1e3'], "config train.steps = '1e3' must be of type int"),
    (['--config.train.steps=' + '9' * 5000], 'must be of type int'),
    (['--config.optimizer.eps=nan'], 'must be a finite number'),
    (['--config.model.tie_embeddings=perhaps'], 'Non-boolean argument'),
    (['--config.train.steps'], 'Missing value'),
    (['--confg=x.py'], "Unknown command line flag 'confg'. Did you mean: config"),
    (['--flagfile=none.txt'], 'Unable to open flagfile'),
    (['--flagfile=.'], 'Unable to open flagfile'),
    (['--config=nowhere.py'], '^--config = .nowhere.py. is no file, and .* comes with this package: .*tiny'),
    (['--config=.'], 'it is a folder, not a file'),
    (['--config=/dev/zero'], 'a pipe or device, not a file'),
    (['--config=gs://b/c.py'], '--config = .* is an address'),
    (['--config='], "^--config = '' must be the path of a file"),
  ],
)
def test_mistakes_on_the_command_line(config_of, arguments, message):
  with pytest.raises(UserError, match=message):
    config_of(*arguments)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = (', 'SyntaxError'),
    ('\0', 'null bytes'),
    ('x = 1\nx += y', "line 2: NameError: name 'y'"),
    ('import sys\nsys.exit()', 'line 2: SystemExit'),
    ('class Mine(BaseException): pass\nraise Mine(5)', 'line 2: Mine: 5'),
    ('x = 1', r'defines no get_config\(\)'),
    ('get_config = 5', r'defines no get_config\(\)'),
    ('def get_config(arg=""): return 1 / 0', 'line 1: ZeroDivisionError'),
    ('def get_config(arg=""): pass', 'gives NoneType, not settings'),
    ('def get_config(arg=""): return {"train": 5}', 'config train is a section and cannot be set to 5'),
    ('def get_config(arg=""): return {5: 5}', "unknown config key '5'"),
    (
      'from moe.config import *\ndef get_config(arg=""): return to_config_dict(Config(), "train.sed=1")',
      "'train.seed'",
    ),
  ],
)
def test_config_files_that_do_not_work(config_of, tmp_path, text, message):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  with pytest.raises(UserError, match=message):
    config_of(f'--config={file}', '--config.train.steps=5')


def test_files_of_flags_that_name_one_another(config_of, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for number in range(1000):
    (tmp_path / f'{number}.txt').write_text(f'--flagfile={number + 1}.txt')
  with pytest.raises(UserError, match='bad command line: files of --flagfile'):
    config_of('--flagfile=0.txt')


def test_a_pipe_is_not_waited_for(config_of, tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(UserError, match='a pipe or device'):
    config_of(f'--config={tmp_path / "pipe"}')


# ------------------------------------------------------------------------------------------------------------- endings


def ends(main, stdout=subprocess.PIPE, environ=(), arguments=()):
  """(status, stdout, stderr) of a script whose main does this."""
  imports = '"""What it does."""\nfrom moe import cli\nfrom moe.errors import UserError'
  code = f'{imports}\ndef main(argv):\n  {main}\ncli.run(main)'
  environ = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'} | dict(environ)
  command, where = [sys.executable, '-c', code, *arguments], {'cwd': ROOT, 'env': environ}
  done = subprocess.run(command, **where, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ('main', 'status', 'out', 'err'),
  [
    ('print("x"); raise UserError("no " + "y" * 999)', 2, 'x\n', r'error: no y+ \.\.\. y+\n'),
    ('raise MemoryError', 2, '', 'error: there is not enough memory: Python could get no more\n'),
    ('raise RuntimeError("RESOURCE_EXHAUSTED: 5 GB")', 2, '', 'error: there is not enough memory .* 5 GB\n'),
    (
      'raise RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 5 bytes.")',
      2,
      '',
      'error: there is not enough memory .* 5 bytes.\n',
    ),
    ('import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)', 130, '', ''),
    ('raise OSError(28, "No space left", "/full/x")', 2, '', 'error: cannot write /full/x: No space left\n'),
    ('raise BrokenPipeError(32, "a socket")', 1, '', r'Traceback.*BrokenPipeError.*a socket\n'),
    ('raise RuntimeError("a bug")', 1, '', r'Traceback.*RuntimeError: a bug\n'),
    ('return 1', 1, '', ''),
  ],
)
def test_endings(main, status, out, err):
  found = ends(main)
  assert found[:2] == (status, out)
  assert re.fullmatch(err, found[2], re.DOTALL)
  assert not err.startswith('error') or len(found[2]) <= MOST_CHARACTERS + len('error: \n')


@pytest.mark.parametrize('main', ['return print("x")', 'print("x" * 10**6)'])
@pytest.mark.parametrize('environ', [{}, {'PYTHONUNBUFFERED': '1'}], ids=['buffered', 'unbuffered'])
def test_a_reader_that_has_gone(main, environ):
  read, write = os.pipe()
  os.close(read)
  try:
    assert ends(main, write, environ)[::2] == (128 + signal.SIGPIPE, '')
  finally:
    os.close(write)


def test_a_reader_of_the_list_of_commands_that_has_gone():
  read, write = os.pipe()
  os.close(read)
  try:
    command = [sys.executable, '-m', 'moe', '--help']
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, '')
  finally:
    os.close(write)


def test_exports_refuse_settings_that_they_would_ignore():
  command = [sys.executable, '-m', 'moe', 'convert', '--run=x', '--to_hf=y', '--config.train.seed=2']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  says = 'error: --config.train.seed is for --from_hf; what --to_hf writes follows from the run\n'
  assert (done.returncode, done.stderr) == (2, says)


def test_output_that_cannot_be_written():
  with open('/dev/full', 'w') as full:
    assert ends('print("x")', full)[::2] == (2, 'error: cannot write the output: No space left on device\n')


def test_characters_that_the_output_lacks():
  assert ends('print("\u00e9")', environ={'PYTHONIOENCODING': 'ascii'}) == (0, '\\xe9\n', '')


def test_help_is_no_failure():
  for argument in ('--help', '--helpfull'):
    status, out, err = ends('print("ran")', arguments=[argument])
    assert (status, err) == (0, '')
    assert out.startswith('What it does.')
    assert 'ran' not in out


def test_ctrl_c_while_modules_are_imported():
  code = 'from moe import cli; import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert (done.returncode, done.stderr) == (130, '')
