"""What one train step means: accumulation, recomputation, precision, padding, the bias's timing, its collectives."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from test_step_mesh import CONFIG, SMALL, Run, change, documents, leaves, relative, start

from moe.errors import UserError
from moe.parallel.mesh import abstract_mesh
from moe.registry import BIAS_RULES
from moe.train import state, step
from moe.validation import AUX_LOSSES

# gamma moves any expert past any other, so that a bias at work is seen in the loads.
STEP = change(
  CONFIG, model=dataclasses.replace(SMALL, num_layers=2, mtp_depth=1), balance={'gamma': 4.0}, dispatch='local'
)


@pytest.fixture(scope='module')
def base(mesh_of):
  return Run(STEP, mesh_of())


@pytest.fixture(scope='module')
def evaluate(mesh_of):
  """evaluate(state, batch): the compiled evaluation step's sums."""
  rows = {key: value[None] for key, value in documents(STEP).items()}
  old = state.abstract(STEP)
  lowered = step.make_eval_step(step.resolve(STEP, mesh_of(), 'cpu'), mesh_of()).lower(
    old.params, old.balance['bias_LE'], rows
  )
  compiled = lowered.compile()

  def evaluate(old, batch):
    batch = jax.device_put(
      {key: value[None] for key, value in batch.items()}, NamedSharding(mesh_of(), step.BATCH_SPEC)
    )
    return jax.device_get(compiled(old.params, old.balance['bias_LE'], batch))

  return evaluate


def first_step(run, batch=None, **balance):
  """Metrics of a step from the start, whose balance state is replaced as given."""
  old = start(run.config)
  run.state = run.place(old._replace(balance=old.balance | balance))
  return run(documents(run.config) if batch is None else batch)


def ruled(old_bias_LE, load_LE, config):
  """The sign rule's new bias, from integers and exact float32 arithmetic."""
  return old_bias_LE + np.float32(config.balance.gamma) * np.sign(
    load_LE.sum(1, keepdims=True) - load_LE * load_LE.shape[1]
  ).astype(np.float32)


def assert_same_step(got, expected, tolerance):
  np.testing.assert_array_equal(got['load_LE'], expected['load_LE'])
  for key in sorted(expected.keys() - {'load_LE'}):
    np.testing.assert_allclose(got[key], expected[key], rtol=tolerance, atol=1e-7, err_msg=key)


@pytest.mark.parametrize(
  'train', [{'microbatches': 4, 'remat': 'dots'}, {'remat': 'full', 'unroll_layers': 2}], ids=str
)
def test_neither_accumulation_nor_recomputation_nor_unrolling_changes_a_step(train, base, mesh_of):
  """Loads counted twice by a recomputed layer, or averaged over microbatches, would show."""
  other = Run(change(STEP, train=train), mesh_of())
  assert_same_step(first_step(other), first_step(base), 1e-5)
  for (path, expected), (_, got) in zip(leaves(base.state.params), leaves(other.state.params), strict=True):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6, err_msg=path)


def test_bfloat16_compute_leaves_masters_and_bias_in_float32(base, mesh_of):
  expected = first_step(base)
  run = Run(
    change(STEP, precision={'compute': 'bfloat16', 'matmul': 'default'}, optimizer={'moments': 'bfloat16'}), mesh_of()
  )
  got = first_step(run)
  assert {leaf.dtype for leaf in jax.tree.leaves((run.state.params, run.state.balance))} == {jnp.dtype('float32')}
  adam = next(part for part in run.state.opt_state if hasattr(part, 'mu'))
  assert {leaf.dtype for leaf in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype('bfloat16')}
  assert 1e-5 < relative(got['loss'], expected['loss']) < 0.01  # it was bfloat16, and it is the same model
  assert relative(got['grad_norm'], expected['grad_norm']) < 0.03
  assert got['load_LE'].sum() == expected['load_LE'].sum()
  np.testing.assert_array_equal(
    run.state.balance['bias_LE'], ruled(start(STEP).balance['bias_LE'], got['load_LE'], STEP)
  )
  # Updates far below bfloat16's resolution reach the weights: a float32 master, not a bfloat16 one, was updated.
  moved = np.asarray(run.state.params['w_head_DV'])[:, : STEP.model.vocab_size]
  assert np.any(moved != moved.astype(jnp.bfloat16).astype(np.float32))


def test_fp8_rounds_the_modules_that_the_policy_names(mesh_of):
  config = change(STEP, model=dataclasses.replace(STEP.model, num_shared_experts=1, mtp_depth=0))
  exact, experts, ffn, attention = (
    first_step(Run(change(config, precision={'fp8': modules}), mesh_of()))
    for modules in ('', 'experts', 'ffn', 'attention')
  )
  for got in (experts, ffn, attention):
    assert 1e-6 < relative(got['loss'], exact['loss']) < 0.01
    assert relative(got['grad_norm'], exact['grad_norm']) < 0.05
  assert len({float(got['loss']) for got in (experts, ffn, attention)}) == 3
  # The first router sees no rounded number, unless attention before it rounds.
  np.testing.assert_array_equal(experts['load_LE'][0], exact['load_LE'][0])


def test_fp8_rounds_what_is_dispatched_to_other_shards(mesh_of):
  config = change(STEP, model=dataclasses.replace(STEP.model, mtp_depth=0), dispatch='all_to_all')
  exact, low = (
    first_step(Run(change(config, precision={'fp8': modules}), mesh_of(expert=2))) for modules in ('', 'dispatch')
  )
  assert 1e-6 < relative(low['loss'], exact['loss']) < 0.01
  np.testing.assert_array_equal(low['load_LE'][0], exact['load_LE'][0])


def test_fp8_in_float32_is_refused_on_hopper(mesh_of):
  config = change(STEP, precision={'fp8': 'experts', 'compute': 'float32'})
  with pytest.raises(UserError, match=r"precision.fp8 = 'experts' needs precision.compute = bfloat16"):
    step.resolve(config, mesh_of(), 'hopper')
  assert step.resolve(config, mesh_of(), 'cpu').grouped_matmul == 'blocked'


def test_padding_is_neither_counted_nor_learned_from(base):
  batch = documents(STEP)
  padding_BS = batch['segment_BS'] == 0
  expected = first_step(base)
  weights = jax.device_get(base.state.params)
  other = dict(batch, token_BS=np.where(padding_BS, 17, batch['token_BS']).astype(np.int32))
  assert not np.array_equal(other['token_BS'], batch['token_BS'])
  assert_same_step(first_step(base, other), expected, 1e-6)
  for (path, old), (_, new) in zip(leaves(weights), leaves(base.state.params), strict=True):
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-6, err_msg=path)

  segment_BS = batch['segment_BS']
  here, after = segment_BS[:, :-1], segment_BS[:, 1:]
  routed = np.array([(here > 0).sum()] * 2 + [((here > 0) & (here == after)).sum()])  # 2 layers and the MTP module
  np.testing.assert_array_equal(expected['load_LE'].sum(1), routed * STEP.model.top_k)
  assert expected['batch_tokens'] == routed[2] < routed[0] < here.size


def test_order_of_the_rows_does_not_matter(base):
  expected = first_step(base)
  order = np.random.default_rng(1).permutation(STEP.train.batch_size)
  assert_same_step(first_step(base, {key: value[order] for key, value in documents(STEP).items()}), expected, 1e-5)


def test_bias_selects_from_the_next_step_on(base, evaluate):
  """A step routes by the bias it was given; the one it makes, which overrules every score, is the next step's."""
  batch, old = documents(STEP), start(STEP)
  first = first_step(base)
  np.testing.assert_array_equal(first['load_LE'], evaluate(base.place(old), batch)['load_LE'])
  bias_LE = np.asarray(base.state.balance['bias_LE'])
  np.testing.assert_array_equal(bias_LE, ruled(old.balance['bias_LE'], first['load_LE'], STEP))
  second = base(batch)
  favoured_LE = bias_LE > 2
  assert np.all(favoured_LE.sum(1) >= STEP.model.top_k)
  assert np.all(first['load_LE'][~favoured_LE] > 0)
  assert np.all(second['load_LE'][~favoured_LE] == 0)
  np.testing.assert_array_equal(base.state.balance['bias_LE'], ruled(bias_LE, second['load_LE'], STEP))


def test_bias_decides_who_is_chosen_and_nothing_else(base):
  """The same on all experts it changes nobody's rank; no loss and no gradient may then see it."""
  zero_LE = np.zeros_like(start(STEP).balance['bias_LE'])
  expected, got = first_step(base, bias_LE=zero_LE), first_step(base, bias_LE=zero_LE + 0.5)
  for key in ('bias_min', 'bias_max'):
    assert got.pop(key) == expected.pop(key) + 0.5
  assert_same_step(got, expected, 1e-6)


def test_evaluation_changes_nothing_and_measures_the_training_loss(base, evaluate):
  batch = documents(STEP)
  expected = first_step(base)
  alone = base(documents(STEP, 1))
  base.state = base.place(start(STEP))
  sums = evaluate(base.state, batch)
  means = sums['nats'] / sums['predicted']
  assert relative(means[0], expected['loss']) < 1e-6
  assert relative(means[1], expected['mtp_loss']) < 1e-6
  before = jax.device_get(base.state.balance['bias_LE'])
  assert_same_step(base(batch), expected, 0)
  evaluate(base.state, batch)
  assert_same_step(base(documents(STEP, 1)), alone, 0)  # evaluation's tokens are in no load and so in no bias
  np.testing.assert_array_equal(before, start(STEP).balance['bias_LE'])


LOSSES = [(aux, 'microbatch') for aux in AUX_LOSSES] + [('switch', 'global_batch')]


@pytest.mark.parametrize('loss', LOSSES, ids='-'.join)
@pytest.mark.parametrize('rule', BIAS_RULES)
def test_any_rule_goes_with_any_loss(rule, loss):
  """Traced on a sharded mesh, where a forgotten reduction is a type error. The state that comes out fits back in."""
  aux, scope = loss
  balance = {'bias_rule': rule, 'aux_loss': aux, 'aux_scope': scope, 'z_loss': 0.001}
  config = change(
    CONFIG,
    model=SMALL,
    balance=balance,
    train={'microbatches': 2},
    dispatch='all_gather',
    grouped_matmul='ragged_dot',  # quicker to trace
  )
  old = state.abstract(config)
  batch = jax.ShapeDtypeStruct((2, 16, config.data.seq_len + 1), jnp.int32)
  mesh = abstract_mesh((1, 2, 2, 2))
  made = step.make_train_step(step.resolve(config, mesh, 'cpu'), mesh)
  new, metrics = jax.eval_shape(made, old, {'token_BS': batch, 'segment_BS': batch})
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), old, new)
  assert all(jax.tree.leaves(same))
  assert (metrics['load_LE'].shape, metrics['load_LE'].dtype) == ((1, 16), 'int32')
  assert {leaf.shape for key, leaf in metrics.items() if key != 'load_LE'} == {()}


class Collective:
  """A collective of a compiled program: its kind, the groups of devices it joins, and its largest operand."""

  def __init__(self, line):
    result, self.kind = re.search(
      r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)', line
    ).groups()
    sizes = [math.prod(map(int, filter(None, dims.split(',')))) for dims in re.findall(r'\w\[([\d,]*)\]', result)]
    self.largest = max(sizes)
    self.groups = groups_of(line)

  def __repr__(self):
    return f'{self.kind} of {self.largest} over {self.groups}'


def groups_of(line):
  """Groups of device numbers that a collective joins, from three of the ways in which XLA writes them, else None."""
  if listed := re.search(r'replica_groups=\{(.*?\})\}', line):
    return {tuple(map(int, group.split(','))) for group in re.findall(r'\{([\d,]+)\}', listed[1] + '}')}
  # mesh['data'=4,'tensor'=2], device_ids=([2,4]T(1,0)) {'data'}: the devices, transposed, laid out over the axes.
  named = re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{(.*?)\}', line)
  if not named:
    return None
  axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
  shape, names = [int(size) for size in axes.values()], list(axes)
  numbers = np.arange(math.prod(shape))
  if named[2]:
    numbers = numbers.reshape(integers(named[2])).transpose(integers(named[3]))
  return groups_over([names.index(axis) for axis in re.findall(r"'(\w+)'", named[4])], numbers.reshape(shape))


def integers(text):
  return [int(number) for number in text.split(',')]


def collectives(hlo):
  """(collectives outside any loop, collectives inside one) of a compiled program's text."""
  bodies, name = {}, None
  for line in hlo.splitlines():
    if header := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      name = 'ENTRY' if header[1] else header[2]
      bodies[name] = []
    elif name:
      bodies[name].append(line)

  def reach(name, looping, seen):
    if (name, looping) in seen:
      return
    seen.add((name, looping))
    for line in bodies[name]:
      called = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)', line)
      for other in called:
        reach(other, looping or 'body=' in line, seen)

  seen = set()
  reach('ENTRY', False, seen)
  found = {False: [], True: []}
  for name, looping in sorted(seen):
    for line in bodies[name]:
      if re.search(r'= .* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(', line):
        found[looping].append(Collective(line))
  return found[False], found[True]


def groups_over(axes, numbers):
  """Groups of the device numbers of a mesh that differ in these of its axes only."""
  kept = [i for i in range(numbers.ndim) if i not in axes]
  size = math.prod(numbers.shape[i] for i in axes)
  return {tuple(sorted(row)) for row in numbers.transpose(*kept, *axes).reshape(-1, size).tolist()}


def test_weights_are_gathered_and_gradients_reduced_once_per_step(mesh_of):
  """Within the microbatch loop only activations travel: over tensor, and over expert to the experts and back."""
  config = change(CONFIG, model=SMALL, train={'microbatches': 2}, dispatch='all_gather')
  run = Run(config, mesh_of(data=2, expert=2, tensor=2))
  outside, inside = collectives(run.compiled.as_text())
  numbers = np.arange(8).reshape(1, 2, 2, 2)
  data, expert, tensor, batch = (groups_over(axes, numbers) for axes in ([1], [2], [3], [1, 2]))

  assert {collective.kind for collective in inside} == {'all-reduce', 'all-gather', 'reduce-scatter'}
  for collective in inside:
    assert collective.groups == (tensor if collective.kind == 'all-reduce' else expert), collective

  params = [path for path, _ in leaves(state.abstract(config).params)]
  of_experts = sum('/experts/' in path for path in params)
  assert of_experts == 3
  for kind in ('all-gather', 'reduce-scatter'):
    groups = [collective.groups for collective in outside if collective.kind == kind]
    assert groups.count(data) == of_experts
    assert groups.count(batch) == len(params) - of_experts
    assert len(groups) == len(params)
  # What is left are sums of counts, losses and squared norms.
  rest = [collective for collective in outside if collective.kind not in ('all-gather', 'reduce-scatter')]
  assert {collective.kind for collective in rest} == {'all-reduce'}
  assert max(collective.largest for collective in rest) == config.model.num_experts
