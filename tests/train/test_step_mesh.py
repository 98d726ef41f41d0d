"""The train step computes the same on every mesh, and what a naive float64 model computes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding

from moe.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig, TrainConfig
from moe.registry import BIAS_RULES
from moe.train import state, step

# Everything V3 has, split unevenly enough to tell the axes apart.
MODEL = ModelConfig(
  vocab_size=50,
  d_model=32,
  num_layers=3,
  num_dense_layers=1,
  d_ff=24,
  d_expert=8,
  num_experts=16,
  top_k=4,
  num_groups=4,
  top_groups=2,
  route_scale=1.5,
  num_heads=4,
  q_lora_rank=16,
  kv_lora_rank=16,
  qk_nope_dim=4,
  qk_rope_dim=4,
  v_dim=4,
  mtp_depth=1,
)
CONFIG = Config(
  model=MODEL,
  balance=BalanceConfig(aux_loss='sequence', aux_alpha=0.02, z_loss=0.001, gamma=0.01),
  data=DataConfig(seq_len=8),
  train=TrainConfig(batch_size=32, steps=100),
  # A larger eps keeps Adam's first step, g / (|g| + eps), from blowing rounding up where g is almost 0.
  optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, eps=1e-3, clip_norm=0.5),
  precision=PrecisionConfig(matmul='highest'),
  grouped_matmul='blocked',
)
# One layer and no frills, for what concerns router and mesh only.
SMALL = dataclasses.replace(
  MODEL,
  num_layers=1,
  num_dense_layers=0,
  num_shared_experts=0,
  num_groups=1,
  top_groups=1,
  attention='mha',
  q_lora_rank=0,
  qk_nope_dim=0,
  mtp_depth=0,
)
STEPS_AFTER_THE_FIRST = 4


def change(config, **sections):
  """`config` with fields of sections, or whole ones, replaced: change(CONFIG, train={'seed': 1}, dispatch='local')."""
  new = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in sections.items()}
  return dataclasses.replace(config, **new)


def documents(config, seed=0):
  """A batch of several documents per row, as numpy [B, S + 1]; half of row 1 and all of rows 10 and 11 are padding."""
  rng = np.random.default_rng(seed)
  shape = (config.train.batch_size, config.data.seq_len + 1)
  segment_BS = 1 + np.cumsum(rng.random(shape) < 0.15, axis=1, dtype=np.int32)
  token_BS = rng.integers(0, config.model.vocab_size, shape, np.int32)
  for row, start in ((1, shape[1] // 2), (10, 0), (11, 0)):
    token_BS[row, start:] = segment_BS[row, start:] = 0
  return {'token_BS': token_BS, 'segment_BS': segment_BS}


def start(config, seed=0):
  """A state as numpy arrays: random weights, norm scales that are not 1 and a bias that is not 0."""
  rng = np.random.default_rng(seed)

  def weight(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    return 1 + 0.1 * noise if path[-1].key.startswith('scale') else 0.2 * noise

  empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.abstract(config))
  bias_LE = (0.05 * rng.standard_normal(empty.balance['bias_LE'].shape)).astype(np.float32)
  if BIAS_RULES[config.balance.bias_rule].factor:
    bias_LE += 1
  params = jax.tree.map_with_path(weight, empty.params)
  return empty._replace(params=params, balance=empty.balance | {'bias_LE': bias_LE})


class Run:
  """A compiled train step, its mesh, and a state and batches placed on it."""

  def __init__(self, config, mesh):
    self.config, self.mesh = step.resolve(config, mesh, 'cpu'), mesh
    micro = self.config.train.microbatches
    shape = (micro, config.train.batch_size // micro, config.data.seq_len + 1)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key in ('token_BS', 'segment_BS')}
    lowered = step.make_train_step(self.config, mesh).lower(state.abstract(config), batch)
    self.compiled = lowered.compile()
    self.state = self.place(start(config))

  def place(self, values):
    # Copied, since donating a buffer that XLA borrowed from numpy would scribble over the values.
    return jax.device_put(jax.tree.map(np.array, values), state.shardings(self.config, self.mesh))

  def batch(self, batch):
    micro = self.config.train.microbatches
    split = {key: value.reshape(micro, -1, value.shape[1]) for key, value in batch.items()}
    return jax.device_put(split, NamedSharding(self.mesh, step.BATCH_SPEC))

  def __call__(self, batch):
    """Advances the state by one step and returns its metrics as numpy arrays."""
    self.state, metrics = self.compiled(self.state, self.batch(batch))
    return jax.device_get(metrics)


class Trace(NamedTuple):
  """What one mesh makes of the same start and batches."""

  first: dict  # metrics
  state: state.TrainState  # after the first step
  gradient: dict
  losses: list


def gradient_of(after, metrics, config):
  """The gradient that the first step saw, from Adam's first moment, unclipped."""
  clip = config.optimizer.clip_norm
  factor = max(1, metrics['grad_norm'] / clip) / (1 - config.optimizer.beta1)
  adam = next(part for part in after.opt_state if hasattr(part, 'mu'))
  return jax.tree.map(lambda mu: mu * factor, adam.mu)


def trace(run):
  first = run(documents(run.config))
  after = jax.device_get(run.state)
  losses = [run(documents(run.config, seed))['total_loss'] for seed in range(1, STEPS_AFTER_THE_FIRST + 1)]
  return Trace(first, after, gradient_of(after, first, run.config), losses)


@pytest.fixture(scope='module')
def reference(mesh_of):
  return trace(Run(CONFIG, mesh_of()))


# Axes, microbatches, dispatch and grouped matmul of each.
MESHES = {
  'data2_expert4_tensor2': ({'data': 2, 'expert': 4, 'tensor': 2}, 1, 'all_gather', 'blocked'),
  'expert16': ({'expert': 16}, 1, 'all_to_all', 'ragged_dot'),
  'data4_tensor4': ({'data': 4, 'tensor': 4}, 1, 'local', 'ragged_dot'),
  'data2_expert8_accumulated': ({'data': 2, 'expert': 8}, 2, 'all_to_all', 'ragged_dot'),
}


def relative(value, expected):
  return np.abs(value - expected).max() / np.abs(expected).max()


def leaves(tree):
  return [('/'.join(str(key.key) for key in path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


@pytest.mark.parametrize('name', MESHES)
def test_every_mesh_trains_the_same(name, mesh_of, reference):
  axes, microbatches, dispatch, matmul = MESHES[name]
  config = change(CONFIG, train={'microbatches': microbatches}, dispatch=dispatch, grouped_matmul=matmul)
  got = trace(Run(config, mesh_of(**axes)))
  np.testing.assert_array_equal(got.first['load_LE'], reference.first['load_LE'])
  np.testing.assert_array_equal(got.state.balance['bias_LE'], reference.state.balance['bias_LE'])
  for key in ('loss', 'mtp_loss', 'aux_loss', 'z_loss', 'total_loss', 'gate_entropy', 'batch_tokens'):
    assert relative(got.first[key], reference.first[key]) < 1e-6, key
  for key in (key for key in reference.first if key.startswith('grad_norm')):
    assert relative(got.first[key], reference.first[key]) < 1e-5, key
  for (path, expected), (_, gradient) in zip(leaves(reference.gradient), leaves(got.gradient), strict=True):
    assert relative(gradient, expected) < 3e-5, path
  for (path, expected), (_, param) in zip(leaves(reference.state.params), leaves(got.state.params), strict=True):
    np.testing.assert_allclose(param, expected, rtol=0, atol=1e-6, err_msg=path)
  np.testing.assert_allclose(got.losses, reference.losses, rtol=1e-4)


def expected_losses(params, bias_LE, batch, config):
  """The float64 model's metrics on a batch, load_LE among them."""
  model, balance = config.model, config.balance
  nats, predicted, routings, routed = oracle.model_forward(
    params, bias_LE, batch['token_BS'], batch['segment_BS'], model
  )
  means, aux, z = nats / predicted, 0.0, 0.0
  for routing, mask_BS in zip(routings, routed, strict=True):
    scores_BSE = routing.scores_TE.reshape(*mask_BS.shape, -1)
    aux += balance.aux_alpha * oracle.sequence_loss(scores_BSE, mask_BS, model.top_k)
    z += balance.z_loss * np.mean(oracle.log_sum_exp(routing.logits_TE[mask_BS.reshape(-1)]) ** 2)
  total = means[0] + config.train.mtp_weight * means[1] + aux + z
  load_LE = np.array([routing.load_E for routing in routings])
  return {'loss': means[0], 'mtp_loss': means[1], 'aux_loss': aux, 'z_loss': z, 'total_loss': total, 'load_LE': load_LE}


def test_losses_and_loads_are_those_of_a_float64_model(reference):
  old = start(CONFIG)
  expected = expected_losses(
    oracle.float64(old.params), oracle.float64(old.balance['bias_LE']), documents(CONFIG), CONFIG
  )
  np.testing.assert_array_equal(reference.first['load_LE'], expected.pop('load_LE'))
  for key, value in expected.items():
    assert relative(reference.first[key], value) < 1e-6, key


def test_gradient_is_the_slope_of_the_float64_loss(reference):
  """Central differences of the total loss, along each parameter group's gradient with as much random noise added."""
  rng = np.random.default_rng(0)
  old, batch = start(CONFIG), documents(CONFIG)
  params, bias_LE = oracle.float64(old.params), oracle.float64(old.balance['bias_LE'])
  gradient = oracle.float64(reference.gradient)
  groups = {step.parameter_group(path) for path, _ in jax.tree.leaves_with_path(params)}
  assert groups == {'attention', 'embedding', 'experts', 'ffn', 'head', 'mtp', 'norm', 'router', 'shared'}

  def loss_at(direction, distance):
    moved = jax.tree.map(lambda w, d: w + distance * d, params, direction)
    return expected_losses(moved, bias_LE, batch, CONFIG)['total_loss']

  for group in sorted(groups):
    slope = unit_of_group(gradient, group)
    noise = unit_of_group(jax.tree.map(lambda g: rng.standard_normal(g.shape), gradient), group)
    direction = jax.tree.map(np.add, slope, noise)
    measured = (loss_at(direction, 1e-5) - loss_at(direction, -1e-5)) / 2e-5
    expected, size = dot(gradient, direction), dot(gradient, slope)
    assert size > 1e-3
    assert abs(measured - expected) < 1e-5 * size, group


def unit_of_group(tree, group):
  """The group's part of the tree, scaled to norm 1; 0 elsewhere."""
  part = jax.tree.map_with_path(lambda path, x: x * (step.parameter_group(path) == group), tree)
  size = norm(part)
  return jax.tree.map(lambda x: x / size, part)


def dot(a, b):
  return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))


def test_first_update_is_clipped_adamw(reference):
  """The new weights from the gradient, by AdamW's formulas for its first step."""
  opt, old = CONFIG.optimizer, start(CONFIG)
  assert reference.first['grad_norm'] > opt.clip_norm  # or clipping would go untested
  assert relative(norm(reference.gradient), reference.first['grad_norm']) < 1e-6
  rate = opt.learning_rate / opt.warmup_steps
  assert relative(reference.first['learning_rate'], rate) < 1e-6
  for (path, w), (_, g), (_, new) in zip(
    leaves(old.params), leaves(reference.gradient), leaves(reference.state.params), strict=True
  ):
    g = g * opt.clip_norm / reference.first['grad_norm']
    decay = 0 if '/scale' in '/' + path else opt.weight_decay
    expected = w - rate * (g / (np.abs(g) + opt.eps) + decay * w)
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-6, err_msg=path)


def test_bias_moves_once_against_the_load_and_knows_no_weight_decay(reference):
  load_LE = reference.first['load_LE']
  gap_LE = np.sign(load_LE.sum(1, keepdims=True) - load_LE * load_LE.shape[1]).astype(np.float32)
  assert {-1, 1} <= set(gap_LE.flat)
  expected = start(CONFIG).balance['bias_LE'] + np.float32(CONFIG.balance.gamma) * gap_LE
  np.testing.assert_array_equal(reference.state.balance['bias_LE'], expected)
  assert reference.state.step == 1


PAIRS = {
  'smebu_switch_microbatch': ({'bias_rule': 'smebu', 'aux_loss': 'switch', 'aux_scope': 'microbatch'}, 1),
  'quantile_switch_global_batch': ({'bias_rule': 'quantile', 'aux_loss': 'switch', 'aux_scope': 'global_batch'}, 2),
}


def expected_switch_loss(config):
  """Of the first step: each microbatch's, by its own loads or those so far, weighted by tokens."""
  old = start(config)
  params, bias_LE = oracle.float64(old.params), oracle.float64(old.balance['bias_LE'])
  total, tokens, seen_E = 0.0, 0, 0
  for rows in np.split(np.arange(config.train.batch_size), config.train.microbatches or 1):
    part = {key: value[rows] for key, value in documents(config).items()}
    _, _, [routing], [mask_BS] = oracle.model_forward(
      params, bias_LE, part['token_BS'], part['segment_BS'], config.model
    )
    seen_E = routing.load_E + (seen_E if config.balance.aux_scope == 'global_batch' else 0)
    total += mask_BS.sum() * oracle.switch_loss(routing.scores_TE, seen_E, mask_BS.reshape(-1))
    tokens += mask_BS.sum()
  return config.balance.aux_alpha * total / tokens


@pytest.mark.parametrize('name', PAIRS)
def test_rules_with_more_state_and_losses_over_the_mesh_are_the_same_on_two_meshes(name, mesh_of):
  """The Switch loss sees loads of all shards; SMEBU has momentum, the quantile rule a histogram of the whole batch."""
  balance, microbatches = PAIRS[name]
  config = change(
    CONFIG,
    model=SMALL,
    balance={**balance, 'gamma': 0.1},
    train={'microbatches': microbatches},
    grouped_matmul='ragged_dot',
  )
  one, many = Run(config, mesh_of()), Run(config, mesh_of(data=2, expert=2))
  after, switch_loss = start(config).balance, expected_switch_loss(config)
  for seed in range(2):
    expected, got = one(documents(config, seed)), many(documents(config, seed))
    np.testing.assert_array_equal(got['load_LE'], expected['load_LE'])
    assert seed or relative(expected['aux_loss'], switch_loss) < 1e-5
    for key in ('loss', 'aux_loss', 'z_loss', 'grad_norm'):
      assert relative(got[key], expected[key]) < 1e-5, key
    before, after = after, jax.device_get(one.state.balance)
    assert relative(after['bias_LE'], before['bias_LE']) > 0.01
    for (path, expected_leaf), (_, leaf) in zip(leaves(after), leaves(jax.device_get(many.state.balance)), strict=True):
      np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-6, err_msg=path)


def test_fresh_state_is_the_same_on_every_mesh(mesh_of):
  config = change(CONFIG, model=SMALL, optimizer={'moments': 'bfloat16'})
  one, many = (state.create(config, mesh) for mesh in (mesh_of(), mesh_of(data=2, expert=4, tensor=2)))
  for (path, a), (_, b) in zip(leaves(one.params), leaves(many.params), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=path)
    if path.rsplit('/')[-1].startswith('w_'):
      assert abs(np.std(a) / config.model.init_std - 1) < 0.2, path
    else:
      np.testing.assert_array_equal(a, 1, err_msg=path)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((many.step, many.balance, many.opt_state)))
  experts = many.params['layers']['experts']['w_up_eDF']
  assert {shard.data.size for shard in experts.addressable_shards} == {experts.size // 16}
