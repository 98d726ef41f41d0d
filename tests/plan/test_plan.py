"""moe plan: a table of schedules, a picture, and one line for what cannot be."""

import subprocess
import sys

import matplotlib.image
import pytest
from processes import environment, script

from moe.errors import UserError
from moe.parallel.schedule import Times, make
from moe.plan import pipeline


def test_stages_of_half_the_size_count_half():
  """DualPipeV on 4 ranks: 6 units of half a stage, 9 held; 8 microbatches of 3 units of work."""
  cost = pipeline.cost('dualpipe_v', 4, 8, Times())
  assert cost == ('dualpipe_v', 3, 3, 6, 3, 3 / 27, 4.5)
  assert pipeline.cost('gpipe', 4, 8, Times()) == ('gpipe', 9, 9, 9, 9, 9 / 33, 8)


def test_the_picture_has_each_operation(tmp_path):
  schedules = [make(name, 4, 8) for name in ('1f1b', 'dualpipe_v')]
  figure = pipeline.picture(schedules, Times(), lockstep=False)
  operations = [len(axes.collections[0].get_paths()) for axes in figure.axes]
  assert operations == [3 * 4 * 8, 3 * 8 * 8]
  assert {axes.get_xlim() for axes in figure.axes} == {(0, 33)}


def test_command(tmp_path, capsys):
  script('plan', '--ranks=4', '--microbatches=8', f'--plot={tmp_path / "plan.png"}')
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ['zb_h1', '3', '3', '3', '3', '11.1%', '4'] in rows
  assert rows[-1] == ['picture:', str(tmp_path / 'plan.png')]
  assert matplotlib.image.imread(tmp_path / 'plan.png').std() > 0.1
  script('plan', '--ranks=5', '--microbatches=10')
  assert "not shown: 'dualpipe' pairs ranks from both ends" in capsys.readouterr().out


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--schedule=zigzag,gpipe'], "'zigzag' must be one of"),
    (['--schedule=dualpipe', '--ranks=3'], 'must be even, not 3'),
    (['--times=1,2'], '3 or 4 positive numbers'),
    (['--times=1,nan,1'], '3 or 4 positive numbers'),
    (['more'], "no argument 'more'"),
    (['--plot=plan.xyz'], "--plot = 'plan.xyz' must end in .png or .pdf or .svg"),
    (['--plot=plan'], 'must end in'),
    (['--plot=nowhere/plan.png'], "'nowhere/plan.png' cannot be written: there is no folder 'nowhere'"),
    (['--plot=folder.png'], 'cannot be written: it is a folder'),
  ],
)
def test_mistakes(flags, says, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'folder.png').mkdir()
  with pytest.raises(UserError, match=says):
    script('plan', *flags)
  assert not capsys.readouterr().out, 'refused before anything is said'
  assert [path.name for path in tmp_path.iterdir()] == ['folder.png']


@pytest.mark.parametrize(('suffix', 'begins'), [('.svg', b'<?xml'), ('.PDF', b'%PDF')])
def test_the_suffix_says_what_is_drawn(suffix, begins, tmp_path):
  script('plan', '--schedule=gpipe', f'--plot={tmp_path / "plan"}{suffix}')
  assert (tmp_path / f'plan{suffix}').read_bytes().startswith(begins)


def test_it_needs_no_jax():
  code = 'import sys, moe.commands.plan; print(*{"jax", "flax"} & set(sys.modules))'
  done = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
  assert (done.returncode, done.stdout.strip()) == (0, ''), done.stderr
