"""Sweeps packed into one file: what `moe thin` makes, what reports read of it, and what is refused."""

import io
import json
import pathlib
import subprocess
import sys
import warnings
import zipfile

import fake_sweep
import numpy as np
import pytest
from processes import script

from moe.errors import UserError
from moe.files import read_json
from moe.report import packed, sweep_html
from moe.report.results import load_results, metric_names, unfair
from moe.report.run import load_run
from moe.report.sweep import run_rows, table_rows
from moe.sweep import manifest
from moe.sweep.variants import named

THIN = str(pathlib.Path(__file__).parents[2] / 'experiments/thin.py')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """4 variants x 2 seeds, all finished, not to be changed."""
  path = tmp_path_factory.mktemp('sweep') / 'whole'
  fake_sweep.make(path, seeds=(0, 1))
  return path


def pack(folder, out, change=lambda name, run: run):
  """Packs all runs of a folder with all their rows."""
  sweep = manifest.read(folder)
  packed.write(out, sweep, {run.folder: change(run.folder, load_run(folder / run.folder)) for run in sweep.runs})
  return out


def thin(*arguments):
  return subprocess.run([sys.executable, THIN, *map(str, arguments)], capture_output=True, text=True, check=False)


def change_rows(path, change):
  fake_sweep.write_jsonl(path, [change(json.loads(line)) for line in path.read_text().splitlines()])


def six_digits(path):
  """Logs as thinning leaves them."""
  for file in path.glob('*/metrics.jsonl'):
    change_rows(file, lambda row: {k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in row.items()})


def without_bias(history):
  return [{key: value for key, value in row.items() if key != 'bias_LE'} for row in history]


def test_reports_are_those_of_the_folders(tmp_path, monkeypatch):
  """Tables, page and the data behind every curve, from the file and from the runs."""
  fake_sweep.make(tmp_path / 'whole', seeds=(0, 1))
  six_digits(tmp_path / 'whole')
  before, after = load_results(tmp_path / 'whole'), load_results(pack(tmp_path / 'whole', tmp_path / 'packed'))
  assert table_rows(after) == table_rows(before)
  assert run_rows(after) == run_rows(before)
  for old, new in zip(before.members, after.members, strict=True):
    assert new.run.rows == old.run.rows
    assert [list(row) for row in new.run.rows] == [list(row) for row in old.run.rows]
    assert (new.run.info, new.run.data) == (old.run.info, old.run.data)
    np.testing.assert_equal(list(new.run.load_history), without_bias(old.run.load_history))
    np.testing.assert_equal(list(new.run.evals), list(old.run.evals))
  monkeypatch.setattr(
    'moe.report.figures.to_svg', lambda figure: repr([line.get_xydata() for line in figure.axes[0].lines]).encode()
  )
  assert sweep_html.page(after) == sweep_html.page(before)


@pytest.mark.usefixtures('words_only')
def test_moe_report_reports_it_in_its_folder(whole, tmp_path, capsys):
  script('report', pack(whole, tmp_path / 'packed'))
  assert capsys.readouterr().out.splitlines()[1].startswith('sign')
  assert {path.name for path in (tmp_path / 'packed').iterdir()} == {
    packed.FILE,
    'report.html',
    'table.csv',
    'runs.csv',
  }


def test_the_same_runs_make_the_same_bytes(whole, tmp_path):
  first, second = (pack(whole, tmp_path / name) / packed.FILE for name in ('first', 'second'))
  assert first.read_bytes() == second.read_bytes()
  packed.write(tmp_path / 'third', *packed.read(tmp_path / 'first'))
  with np.load(first) as old, np.load(tmp_path / 'third' / packed.FILE) as new:
    assert set(old) == set(new)
    np.testing.assert_array_equal(new['history/load'], old['history/load'])
    assert old['metrics/step'][:3].tolist() == [1, 2, 3]


def test_values_are_kept_to_the_digits_they_have(tmp_path):
  """Full doubles, counts, keys that some rows lack, and what is no number."""
  fake_sweep.make(tmp_path / 'whole', seeds=(0,))
  odd = {
    1: {'x': 1 / 3, 'n': 7},
    2: {'n': 1 << 40, 'y': None},
    3: {'x': 1e300, 'n': 0, 'y': 2.5},
    4: {'x': float('nan')},
  }
  change_rows(tmp_path / 'whole/none,seed=0/metrics.jsonl', lambda row: row | odd.get(row['step'], {}))
  run = packed.read(pack(tmp_path / 'whole', tmp_path / 'packed'))[1]['none,seed=0']
  extra = [{key: row[key] for key in 'xny' if key in row} for row in run.rows[:5]]
  assert extra[0] == {'x': 1 / 3, 'n': 7}
  assert type(extra[0]['n']) is int
  assert extra[1]['n'] == 1 << 40
  assert np.isnan(extra[1]['y'])
  assert extra[2] == {'x': 1e300, 'n': 0, 'y': 2.5}
  assert np.isnan(extra[3]['x'])
  assert extra[4] == {}
  assert packed.read(tmp_path / 'packed')[1]['sign,seed=0'].rows[0].keys().isdisjoint('xny')


def test_variants_may_have_other_shapes(tmp_path):
  """A run of 8 experts beside one of 16: its loads come back in its own shape."""
  fake_sweep.make(tmp_path / 'whole', seeds=(0,))
  folder = tmp_path / 'whole/none,seed=0'
  info = json.loads((folder / 'config.json').read_text())
  info['config']['model']['num_experts'] = 8
  (folder / 'config.json').write_text(json.dumps(info))
  for name in ('evals.jsonl', 'load_history.jsonl'):
    change_rows(folder / name, lambda row: row | {'load_LE': [layer[:8] for layer in row['load_LE']]})
  runs = packed.read(pack(tmp_path / 'whole', tmp_path / 'packed'))[1]
  for name, shape in (('none', (2, 8)), ('sign', (2, 16))):
    expected = load_run(tmp_path / 'whole' / f'{name},seed=0')
    assert runs[f'{name},seed=0'].evals[-1]['load_LE'].shape == shape
    np.testing.assert_equal(runs[f'{name},seed=0'].load_history, without_bias(expected.load_history))


def rewritten(path, change):
  """The file again, after a change to its dictionary of arrays."""
  with np.load(path, allow_pickle=True) as file:
    arrays = dict(file)
  change(arrays)
  np.savez_compressed(path, **arrays)


def about(arrays, change):
  found = json.loads(arrays['about'].tobytes())
  change(found)
  arrays['about'] = np.frombuffer(json.dumps(found).encode(), np.uint8)


def a_run(change):
  return lambda arrays: about(arrays, lambda found: change(found['runs']['none,seed=1']))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda arrays: arrays.pop('about'), 'about'),
    (lambda arrays: arrays.pop('metrics/step'), 'metrics/step'),
    (lambda arrays: arrays.update({'about': np.frombuffer(b'[1]', np.uint8)}), 'no JSON object'),
    (lambda arrays: arrays.update({'about': np.frombuffer(b'[' * 99_999, np.uint8)}), 'nested too deeply'),
    (lambda arrays: arrays.update({'metrics/loss': np.array([{}], object)}), 'allow_pickle'),
    (lambda arrays: arrays.update({'metrics/loss': arrays['metrics/loss'][:-1]}), 'is shorter'),
    (lambda arrays: arrays.update({'metrics/loss': np.array(3.0)}), 'float64 ()'),
    (lambda arrays: arrays.update({'metrics/loss': arrays['metrics/loss'].astype('U9')}), '<U9'),
    (lambda arrays: arrays.update({'metrics/step': arrays['metrics/step'][::-1]}), 'out of order'),
    (lambda arrays: arrays.update({'metrics/step': arrays['metrics/step'] * 0.5}), 'must be a number of steps'),
    (lambda arrays: arrays.pop('metrics/loss'), 'without a loss'),
    (lambda arrays: arrays.update({'evals/load': arrays['evals/load'][1:]}), 'rows cannot be'),
    (lambda arrays: arrays.update({'history/load': np.append(arrays['history/load'], 1)}), 'more than all runs'),
    (lambda arrays: arrays.update({'history/load': -arrays['history/load'].astype(int)}), 'negative'),
    (a_run(lambda run: run.pop('info')), 'info'),
    (a_run(lambda run: run.update(rows=1 << 70)), 'rows cannot be'),
    (a_run(lambda run: run.update(rows=-1)), 'rows cannot be'),
    (a_run(lambda run: run.update(rows=0)), 'has no rows'),
    (a_run(lambda run: run.update(evals=[3])), 'damaged'),
    (a_run(lambda run: run['info'].update(config=[])), 'damaged'),
    (a_run(lambda run: run.update(averages=3)), 'damaged'),
    (a_run(lambda run: run['averages'].update(tokens_per_s='fast')), 'averages'),
    (a_run(lambda run: run['averages'].update(tokens_per_s=[1])), 'averages'),
    (a_run(lambda run: run['info']['config']['model'].update(num_experts=1 << 60)), 'num_experts'),
    (a_run(lambda run: run['info']['config'].pop('model')), 'damaged|no setting'),
    (lambda arrays: about(arrays, lambda found: found['sweep'].update(version='0')), 'was swept by version 0'),
    (lambda arrays: about(arrays, lambda found: found.update(sweep=3)), 'damaged'),
  ],
)
def test_files_that_cannot_be_are_one_line(whole, tmp_path, change, said):
  path = pack(whole, tmp_path) / packed.FILE
  rewritten(path, change)
  with pytest.raises(UserError, match=f'{packed.FILE}|{tmp_path.name}') as caught:
    load_results(tmp_path)
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) < 600
  assert any(part in str(caught.value) for part in said.split('|')), str(caught.value)


def test_cut_and_flipped_bytes_are_refused_or_harmless(whole, tmp_path):
  path = pack(whole, tmp_path) / packed.FILE
  data, right, rng = path.read_bytes(), table_rows(load_results(tmp_path)), np.random.default_rng(0)
  said = []
  for trial in range(60):
    place = int(rng.integers(len(data)))
    flipped = data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1 :]
    path.write_bytes(data[:place] if trial % 3 == 0 else flipped)
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert table_rows(load_results(tmp_path)) == right
    except UserError as error:
      said.append(str(error))
  assert len(said) > 40
  assert '\n' not in ''.join(said)


def test_what_would_expand_without_end_is_refused(whole, tmp_path):
  """A member of 300 MB of zeros, one whose header promises 2^50 values, and one of 2^60 values of no bytes."""
  data = pack(whole, tmp_path).joinpath(packed.FILE).read_bytes()

  def added(member):
    """The file with another 'metrics/step', of which the last counts."""
    buffer = io.BytesIO(data)
    with (
      pytest.warns(UserWarning, match='Duplicate name'),
      zipfile.ZipFile(buffer, 'a', zipfile.ZIP_DEFLATED) as file,
      file.open('metrics/step.npy', 'w') as inner,
    ):
      member(inner)
    (tmp_path / packed.FILE).write_bytes(buffer.getvalue())

  added(lambda inner: [inner.write(bytes(1 << 20)) for _ in range(300)])
  with pytest.raises(UserError, match=r'would unpack to 31\d,\d+,\d+ bytes'):
    load_results(tmp_path)
  for header in ({'descr': '<f8', 'shape': (1 << 50,)}, {'descr': '|V0', 'shape': (1 << 60,)}):
    header['fortran_order'] = False
    added(lambda inner, header=header: np.lib.format.write_array_header_1_0(inner, header))
    with pytest.raises(UserError, match='is damaged'):
      load_results(tmp_path)


def test_too_much_is_not_written(whole, tmp_path, monkeypatch):
  monkeypatch.setattr(packed, 'MOST_BYTES', 10_000)
  with pytest.raises(UserError, match='keep fewer rows'):
    pack(whole, tmp_path / 'packed')
  assert not (tmp_path / 'packed').exists()


def test_thinned_results_have_the_same_table(whole, tmp_path):
  done = thin(whole, tmp_path / 'small', '--every=10', '--loads_every=20')
  assert done.returncode == 0, done.stderr
  assert [path.name for path in (tmp_path / 'small').iterdir()] == [packed.FILE]
  before, after = load_results(whole), load_results(tmp_path / 'small')
  for variant in before.variants:
    for key, _, _ in metric_names(before):
      assert after.spread(variant, key) == before.spread(variant, key), key
  assert (table_rows(after), run_rows(after)) == (table_rows(before), run_rows(before))
  assert unfair(after) == []
  assert all(member.finished for member in after.members)
  run = after.members[0].run
  assert [row['step'] for row in run.rows] == [1, 10, 20, 30, 40]
  assert [row['step'] for row in run.load_history] == [1, 20, 40]
  assert run.rows[1]['loss'] == float(f'{before.members[0].run.rows[9]["loss"]:.6g}')
  assert 'command' not in run.info
  assert thin(tmp_path / 'small', tmp_path / 'smaller', '--every=20', '--loads_every=40').returncode == 0
  smaller = load_results(tmp_path / 'smaller')
  assert run_rows(smaller) == run_rows(before)
  assert [row['step'] for row in smaller.members[0].run.rows] == [1, 20, 40]


def test_files_without_averages_are_reported_by_the_rows_they_have(whole, tmp_path):
  thin(whole, tmp_path, '--every=10', '--loads_every=20')
  rewritten(
    tmp_path / packed.FILE,
    lambda arrays: about(arrays, lambda found: [run.pop('averages') for run in found['runs'].values()]),
  )
  member = load_results(tmp_path).members[0]
  speeds = member.run.series('tokens_per_s')[1]
  assert len(speeds) == 5
  assert member.values['tokens_per_s'] == np.median(speeds)
  assert thin(tmp_path, tmp_path / 'again', '--every=20').returncode == 0
  assert load_results(tmp_path / 'again').members[0].values == member.values, 'of the rows it was made from'


def test_thin_leaves_the_sweep_itself_alone(whole):
  before = {path: path.read_bytes() for path in whole.rglob('*') if path.is_file()}
  done = thin(whole, whole / '..' / whole.name)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert 'is the sweep itself' in done.stderr
  assert {path: path.read_bytes() for path in whole.rglob('*') if path.is_file()} == before


def test_thinned_results_gain_runs_of_the_same_sweep_only(tmp_path):
  fake_sweep.make(tmp_path / 'first', seeds=(0,))
  fake_sweep.make(tmp_path / 'second', seeds=(1,))
  for name in ('first', 'second'):
    assert thin(tmp_path / name, tmp_path / 'small').returncode == 0
  assert len(load_results(tmp_path / 'small').members) == 2 * len(fake_sweep.VARIANTS)
  description = read_json(tmp_path / 'second' / manifest.FILE)
  description['base']['train']['batch_size'] = 16
  (tmp_path / 'second' / manifest.FILE).write_text(json.dumps(description))
  done = thin(tmp_path / 'second', tmp_path / 'small')
  assert done.returncode == 2
  assert 'train.batch_size = 8, not 16' in done.stderr


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['a'], 'usage:'),
    (['empty', 'out'], 'is no results folder'),
    (['whole', 'out'], 'no finished run'),
    (['done', 'whole'], 'has no sweep.npz'),
  ],
)
def test_thin_refuses_in_one_line(tmp_path, monkeypatch, arguments, said):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  manifest.open_folder(
    tmp_path / 'whole', manifest.make('fake', 'small', fake_sweep.config(), named({'sign': {}}), (0,))
  )
  fake_sweep.make(tmp_path / 'done', seeds=(0,))
  done = thin(*arguments)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert said in done.stderr
  assert not (tmp_path / 'out').exists()
