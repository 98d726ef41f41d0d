"""Which command may go on in which results folder, and the declared sweeps."""

import json
import os
import pathlib
import threading

import pytest

from moe.config import Config
from moe.errors import UserError
from moe.files import read_json
from moe.sweep import declared, manifest
from moe.sweep.variants import axis, named, overlay
from moe.train.state import count_parameters

DEFINITIONS = str(pathlib.Path(__file__).parents[2] / 'configs/sweeps/declared.py')
GAMMAS = axis('balance.gamma', (0.1, 0.01))


def sweep(name='mine', scale='small', base=None, variants=GAMMAS, seeds=(0,)):
  return manifest.make(name, scale, base or Config(), variants, seeds)


def test_runs_are_variants_by_seeds_in_their_own_folders():
  runs = sweep(seeds=(3, 5)).runs
  assert [run.folder for run in runs] == [
    'gamma=0.1,seed=3',
    'gamma=0.01,seed=3',
    'gamma=0.1,seed=5',
    'gamma=0.01,seed=5',
  ]
  assert runs[3].config == overlay(Config(), {'balance.gamma': 0.01, 'train.seed': 5})


def test_the_same_sweep_goes_on_and_reads_back(tmp_path):
  first = manifest.open_folder(tmp_path / 'new', sweep())
  assert manifest.open_folder(tmp_path / 'new', sweep()) == first == manifest.read(tmp_path / 'new')
  assert first == sweep()


def test_new_seeds_and_variants_are_added(tmp_path):
  manifest.open_folder(tmp_path, sweep(seeds=(1,)))
  more = manifest.open_folder(tmp_path, sweep(variants=axis('balance.gamma', (0.5, 0.1)), seeds=(0,)))
  assert [variant.name for variant in more.variants] == ['gamma=0.1', 'gamma=0.01', 'gamma=0.5']
  assert more.seeds == (1, 0)
  assert manifest.read(tmp_path) == more


def test_two_commands_that_add_to_a_folder_lose_nothing(tmp_path, monkeypatch):
  """The first has read sweep.json and is about to write it when the second comes."""
  manifest.open_folder(tmp_path, sweep(seeds=(0,)))
  read, second = manifest.read, threading.Thread(target=manifest.open_folder, args=(tmp_path, sweep(seeds=(2,))))

  def slow_read(folder):
    found = read(folder)
    if threading.current_thread() is not second:
      second.start()
      second.join(0.5)
    return found

  monkeypatch.setattr(manifest, 'read', slow_read)
  manifest.open_folder(tmp_path, sweep(seeds=(1,)))
  second.join()
  assert read(tmp_path).seeds == (0, 1, 2)


def test_two_commands_that_start_in_a_new_folder_lose_nothing(tmp_path, monkeypatch):
  """The first is in the middle of writing sweep.json when the second comes."""
  write, second = manifest._write, threading.Thread(target=manifest.open_folder, args=(tmp_path, sweep(seeds=(2,))))

  def slow_write(folder, added):
    if threading.current_thread() is not second:
      (folder / 'sweep.json.half').write_text('{')
      second.start()
      second.join(0.5)
      (folder / 'sweep.json.half').unlink()
    write(folder, added)

  monkeypatch.setattr(manifest, '_write', slow_write)
  manifest.open_folder(tmp_path, sweep(seeds=(1,)))
  second.join()
  assert manifest.read(tmp_path).seeds == (1, 2)


def test_a_command_that_was_killed_before_there_was_a_sweep(tmp_path):
  """While it wrote the first sweep.json, under another name."""
  (tmp_path / manifest.LOCK).touch()
  (tmp_path / f'{manifest.FILE}.{"0" * 32}.tmp').write_text('{')
  manifest.open_folder(tmp_path, sweep(seeds=(1,)))
  assert manifest.read(tmp_path).seeds == (1,)
  assert sorted(path.name for path in tmp_path.iterdir()) == [manifest.LOCK, manifest.FILE]


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    ({'name': 'theirs'}, "holds the sweep 'mine' at scale 'small', not 'theirs' at 'small'"),
    ({'scale': 'large'}, "not 'mine' at 'large'"),
    ({'base': overlay(Config(), {'train.steps': 7})}, r'was swept with train\.steps = 1000, not 7'),
    (
      {'variants': named({'gamma=0.1': {'balance.gamma': 0.2}})},
      r"in variant 'gamma=0\.1' balance\.gamma = 0\.1, not 0\.2",
    ),
  ],
)
def test_another_sweep_is_refused(tmp_path, other, message):
  manifest.open_folder(tmp_path, sweep())
  before = (tmp_path / manifest.FILE).read_bytes()
  with pytest.raises(UserError, match=message):
    manifest.open_folder(tmp_path, sweep(**other))
  assert (tmp_path / manifest.FILE).read_bytes() == before


def test_another_cache_is_no_other_sweep(tmp_path):
  manifest.open_folder(tmp_path, sweep())
  assert manifest.open_folder(tmp_path, sweep(base=overlay(Config(), {'data.cache_dir': '/tmp/x'})))


def damaged(file, change):
  content = read_json(file)
  change(content)
  file.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda file: damaged(file, lambda c: c.update(version='0.0.1')), r'swept by version 0\.0\.1, this is'),
    (lambda file: damaged(file, lambda c: c.pop('variants')), "damaged: KeyError.'variants'"),
    (lambda file: file.write_text('{"version"'), 'damaged or not of a sweep'),
    (lambda file: file.write_text('[]'), 'damaged or not of a sweep'),
    (lambda file: file.rename(file.with_name('else.json')), r'holds files but no sweep\.json'),
  ],
)
def test_folders_of_other_things(tmp_path, spoil, message):
  manifest.open_folder(tmp_path, sweep())
  spoil(tmp_path / manifest.FILE)
  with pytest.raises(UserError, match=message) as caught:
    manifest.open_folder(tmp_path, sweep())
  assert '\n' not in str(caught.value)


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / manifest.LOCK)
  with pytest.raises(UserError, match='it is a pipe or device, not a file'):
    manifest.open_folder(tmp_path, sweep())


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is a file'):
    manifest.open_folder(tmp_path / 'file', sweep())


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'seeds': ()}, 'must be one or more different integers'),
    ({'seeds': (1, 1)}, 'must be one or more different integers'),
    ({'variants': axis('train.seed', (1, 2))}, 'seeds are an axis of their own'),
    ({'variants': axis('train.stepps', (1, 2))}, "'stepps=1': unknown setting 'train.stepps'"),
    ({'variants': axis('model.top_k', (1, 99))}, "variant 'top_k=99': config model.top_k = 99 is larger"),
  ],
)
def test_sweeps_that_cannot_run(arguments, message):
  with pytest.raises(UserError, match=message):
    sweep(**arguments)


# ------------------------------------------------------------------------------------------------------ declarations


def load(name='balance', scale='smoke', settings=(), seeds=('0',), definitions=DEFINITIONS, grid=()):
  return declared.load(definitions, name, scale, settings, seeds, grid)


@pytest.mark.parametrize('scale', ['tiny', 'h200', 'smoke'])
@pytest.mark.parametrize('name', ['balance', 'gamma', 'quantile', 'scope', 'gate', 'capacity', 'fp8'])
def test_every_declared_sweep_is_valid_and_no_variant_is_another(name, scale):
  runs = load(name, scale).runs
  assert len({run.config for run in runs}) == len(runs)


def test_balance_holds_all_but_the_balancing_equal():
  """Same data order, initial weights and token budget: those come from settings that no variant touches."""
  loaded = load(seeds=('0', '1'))
  assert all(key.startswith('balance.') for variant in loaded.variants for key in variant.overrides)
  gammas = {run.config.balance.gamma for run in loaded.runs}
  assert gammas == {loaded.base.balance.gamma}


@pytest.mark.parametrize(
  ('scale', 'parameters', 'steps', 'tokens'), [('tiny', 0.54e6, 300, 2048), ('h200', 0.57e9, 1500, 28_672)]
)
def test_scales_are_as_large_as_they_say(scale, parameters, steps, tokens):
  base = load(scale=scale).base
  assert count_parameters(base)[0] == pytest.approx(parameters, rel=0.01)
  assert (base.train.steps, base.train.batch_size * base.data.seq_len) == (steps, tokens)


def test_scope_varies_the_tokens_that_are_counted_over():
  """All variants take the same batch; one microbatch in scope is a whole, a half, a quarter, an eighth of it."""
  loaded = load('scope')
  counted = {
    run.variant: run.config.train.batch_size / run.config.train.microbatches
    for run in loaded.runs
    if run.config.balance.aux_scope == 'microbatch' and run.config.balance.aux_loss == 'switch'
  }
  batch = loaded.base.train.batch_size
  assert sorted(counted.values()) == [batch / 8, batch / 4, batch / 2, batch]
  assert all(run.config.train.batch_size == batch for run in loaded.runs)


def test_settings_of_the_command_line_hold_for_every_run():
  loaded = load(settings=['train.steps=5', 'data.paths=a/,b/', 'model.tie_embeddings=true'])
  for run in loaded.runs:
    assert (run.config.train.steps, run.config.data.paths, run.config.model.tie_embeddings) == (5, 'a/,b/', True)


def test_only_takes_names_and_patterns():
  loaded = load()
  assert declared.select(loaded, ['none', 'switch_0*']) == {'none', 'switch_0.001', 'switch_0.01', 'switch_0.1'}
  assert len(declared.select(loaded, [])) == len(loaded.variants)
  with pytest.raises(UserError, match="'sigh' matches no variant of 'balance'; they are sign; none"):
    declared.select(loaded, ['sigh'])


def test_only_takes_names_that_hold_commas():
  """Of a sweep whose names are products: as the command line cuts them at every comma."""
  loaded = load(name='gate')
  assert declared.select(loaded, ['score_fn=sigmoid', 'sign']) == {'score_fn=sigmoid,sign'}
  assert declared.select(loaded, ['score_fn=softmax', 'none', 'score_fn=sigmoid', 'switch_*']) == {
    'score_fn=softmax,none',
    'score_fn=sigmoid,switch_0.01',
  }
  assert len(declared.select(loaded, ['*sign', 'score_fn=softmax*'])) == 4
  with pytest.raises(UserError, match="'sign' matches no variant"):
    declared.select(loaded, ['score_fn=sigmoid', 'none', 'sign'])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'name': 'balanse'}, "^--sweep = 'balanse' must be one of balance, gamma, quantile, scope, gate, capacity, fp8$"),
    ({'scale': 'huge'}, "--scale = 'huge' must be one of tiny, h200"),
    ({'settings': ['train.stepz=5']}, "unknown setting 'train.stepz'; the nearest valid one is 'train.steps'"),
    ({'settings': ['train.steps=many']}, "--set = 'train.steps=many': config train.steps = 'many' must be of type int"),
    ({'settings': ['train.steps']}, "'train.steps' must look like train.seed=3"),
    ({'settings': ['model.tie_embeddings=1']}, 'must be one of true, false'),
    ({'seeds': ('0', 'one')}, "--seeds = 'one' must be integers"),
    ({'seeds': ('²',)}, "--seeds = '²' must be integers"),
    ({'definitions': '/no/such/file.py'}, '--definitions is no Python file that runs: cannot read'),
    ({'definitions': str(pathlib.Path(__file__).parent)}, 'is no Python file that runs'),
    ({'definitions': str(pathlib.Path(__file__).parents[2] / 'README.md')}, r'README\.md., line \d+: SyntaxError'),
    ({'definitions': __file__.replace('test_manifest', 'test_variants')}, "has no table 'SWEEPS'"),
  ],
)
def test_bad_commands(arguments, message):
  with pytest.raises(UserError, match=message):
    load(**arguments)


GOOD_SCALE = 'from moe.config import Config\nSCALES = {"smoke": Config}\n'
GOOD_SWEEP = 'from moe.sweep.variants import axis\nSWEEPS = {"balance": lambda: axis("balance.gamma", [0.1])}\n'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('1 / 0', r"--definitions = '.*mine\.py', line 1: ZeroDivisionError: division by zero"),
    ('import sys\nsys.exit(3)', 'line 2: SystemExit: 3'),
    ('import no_such_module', "ModuleNotFoundError: No module named 'no_such_module'"),
    ('SWEEPS, SCALES = 5, {}', "has no table 'SWEEPS'"),
    (GOOD_SCALE + 'def bad():\n  return [][1]\nSWEEPS = {"balance": bad}', 'line 4: IndexError: list index'),
    (GOOD_SCALE + 'SWEEPS = {"balance": lambda: None}', "sweep 'balance' .* makes no list of variants"),
    (GOOD_SCALE + 'SWEEPS = {"balance": lambda: [{"a": 1}]}', "sweep 'balance' .* makes no list of variants"),
    (
      GOOD_SCALE + 'SWEEPS = {"balance": []}',
      "--sweep = 'balance' must be a function in the table SWEEPS",
    ),
    (GOOD_SCALE + 'SWEEPS = {"balance": [], "mine": list}', "--sweep = 'balance' must be one of mine$"),
    (GOOD_SWEEP + 'SCALES = {"smoke": lambda: {}}', "scale 'smoke' .* makes dict, not a Config"),
    (GOOD_SWEEP + 'SCALES = {"smoke": lambda: 1 / 0}', 'line 3: ZeroDivisionError'),
    (GOOD_SWEEP + 'SCALES = {"smoke": lambda size: size}', 'TypeError: .* missing 1 required positional argument'),
  ],
)
def test_definitions_that_raise_or_make_something_else(tmp_path, text, message):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  with pytest.raises(UserError, match=message):
    load(definitions=str(file))
  file.write_text(GOOD_SCALE + GOOD_SWEEP)
  assert [run.variant for run in load(definitions=str(file)).runs] == ['gamma=0.1']


@pytest.mark.parametrize('text', ['[' * 100_000, '{"a":' * 100_000, '\0' * 50, '"sweep"', '{}'])
def test_a_damaged_sweep_is_one_line(tmp_path, text):
  manifest.open_folder(tmp_path, sweep())
  (tmp_path / manifest.FILE).write_text(text)
  with pytest.raises(UserError, match=r'sweep\.json is damaged or not of a sweep'):
    manifest.read(tmp_path)
