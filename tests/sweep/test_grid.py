"""`moe ablate --grid`: what it runs, and what it refuses before anything runs."""

import itertools
import pathlib

import pytest
from processes import script

from moe.errors import UserError
from moe.sweep import declared

DEFINITIONS = str(pathlib.Path(__file__).parents[2] / 'configs/sweeps/declared.py')
RATES, RULES = 'optimizer.learning_rate=1e-3,3e-3', 'balance.bias_rule=sign,quantile'


def load(*grid, name=None, settings=(), seeds=('0',)):
  return declared.load(DEFINITIONS, name, 'smoke', settings, seeds, grid)


def test_every_combination_is_a_run_with_these_settings():
  sweep = load(RATES, RULES, seeds=('0', '1'))
  assert (sweep.name, sweep.scale) == ('grid', 'smoke')
  expected = list(itertools.product((0, 1), (0.001, 0.003), ('sign', 'quantile')))
  assert [run.folder for run in sweep.runs] == [
    f'learning_rate={rate},bias_rule={rule},seed={seed}' for seed, rate, rule in expected
  ]
  found = [(run.seed, run.config.optimizer.learning_rate, run.config.balance.bias_rule) for run in sweep.runs]
  assert found == expected
  assert {run.config.model for run in sweep.runs} == {sweep.base.model}


def test_values_have_the_types_of_their_settings():
  sweep = load('model.tie_embeddings=true,false', 'train.batch_size=8')
  assert [variant.overrides for variant in sweep.variants] == [
    {'model.tie_embeddings': True, 'train.batch_size': 8},
    {'model.tie_embeddings': False, 'train.batch_size': 8},
  ]
  assert [variant.name for variant in sweep.variants] == [
    'tie_embeddings=True,batch_size=8',
    'tie_embeddings=False,batch_size=8',
  ]


def test_a_sweep_is_run_at_every_place_of_the_grid():
  plain, sweep = load(name='balance'), load(RATES, name='balance')
  assert sweep.name == plain.name == load().name == 'balance'
  assert [variant.name for variant in sweep.variants] == [
    f'{variant.name},learning_rate={rate}' for variant in plain.variants for rate in (0.001, 0.003)
  ]
  assert declared.select(sweep, ['sign,*']) == {'sign,learning_rate=0.001', 'sign,learning_rate=0.003'}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['optimizer.lr=1'], "unknown setting 'optimizer.lr'; the nearest valid one is 'optimizer.learning_rate'"),
    (['balance=1'], "^--grid = 'balance=1' must look like train.batch_size=8,16$"),
    (['train.steps'], "^--grid = 'train.steps' must look like train.batch_size=8,16$"),
    (['train.steps='], "^--grid = 'train.steps=': config train.steps = '' must be of type int$"),
    (['train.steps=8,,16'], "config train.steps = '' must be of type int"),
    (['train.steps=8,many'], "config train.steps = 'many' must be of type int"),
    (['optimizer.learning_rate=nan'], 'must be a finite number'),
    (['balance.bias_rule=sign,magic'], "variant 'bias_rule=magic': .* must be one of .*none, .*sign"),
    (['model.num_heads=2,0'], "variant 'num_heads=0': "),
    (['optimizer.learning_rate=1e-3,0.001'], r'has 0\.001 twice'),
    ([RATES, 'optimizer.learning_rate=1'], r'another --grid sets optimizer\.learning_rate already'),
    (['train.seed=1,2'], r'seeds are an axis of their own, --seeds=0,1,2'),
    (['data.paths=/etc,x'], "'paths=/etc' must consist of letters"),
    (['train.steps=' + ','.join(map(str, range(1, 200))), 'train.batch_size=' + ','.join(map(str, range(1, 200)))],
     'has 39,601 variants; at most 10,000'),
  ],
)  # fmt: skip
def test_bad_grids_are_one_line_and_run_nothing(tmp_path, arguments, message):
  flags = [f'--grid={argument}' for argument in arguments]
  with pytest.raises(UserError, match=message) as caught:
    script('ablate', '--scale=smoke', f'--workdir={tmp_path / "runs"}', *flags)
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'runs').exists()


def test_what_else_sets_the_same():
  with pytest.raises(UserError, match=r'--set sets optimizer\.learning_rate already'):
    load(RATES, settings=['optimizer.learning_rate=1'])
  with pytest.raises(UserError, match=r"both set 'balance\.bias_rule'"):
    load(RULES, name='balance')
