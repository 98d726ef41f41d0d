"""The pipeline's executor against the same stages in a row, on one device and without any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from moe.ops.varying import vary
from moe.parallel import pipeline
from moe.parallel.cut import LIGHT, cut, equations
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.schedule import SCHEDULES, Times, make

LAYERS, D, F, V, TOKENS = 8, 6, 8, 16, 8  # TOKENS of a microbatch over the whole mesh
VARYING = ('pipe', *BATCH_AXES)
SPECS = {'embedding_VD': P(), 'up_LDF': P(None, None, 'tensor'), 'down_LFD': P(None, 'tensor'), 'side_LDD': P()}


def layer(w, x_TD, here):
  """x + tanh(x up) down + sin(x) side, and a loss and a count; `here` has collectives, nothing on one device.

  The gradient of `side` takes that of the layer's output as it comes.
  """
  y_TD = here['sum'](here['home'](jnp.tanh(here['away'](x_TD) @ w['up_DF'])) @ w['down_FD'])
  return x_TD + y_TD + jnp.sin(x_TD) @ w['side_DD'], 0.1 * (y_TD * y_TD).sum(), (y_TD > 0).sum(dtype=jnp.int32)


ALONE = dict.fromkeys(('sum', 'home', 'away'), lambda a: a)


def exchange(a):
  """Between expert shards, rows in blocks; twice is the identity."""
  blocks = a.reshape(lax.axis_size('expert'), -1, a.shape[-1])
  return lax.all_to_all(blocks, 'expert', 0, 0).reshape(a.shape)


ON_MESH = {'sum': lambda a: lax.psum(a, 'tensor'), 'home': exchange, 'away': exchange}


def nats(embedding_VD, x_TD, token_T):
  """A head that is tied to the embedding."""
  log_TV = jax.nn.log_softmax(x_TD @ embedding_VD.T)
  return -jnp.take_along_axis(log_TV, (token_T * 3 % V)[:, None], 1).sum()


def parameters():
  rng = np.random.default_rng(0)
  draw = lambda *shape: (rng.normal(size=shape) / 2).astype(np.float32)
  return {
    'embedding_VD': draw(V, D),
    'up_LDF': draw(LAYERS, D, F),
    'down_LFD': draw(LAYERS, F, D),
    'side_LDD': draw(LAYERS, D, D) / 4,
  }


STACKED = 'up_LDF', 'down_LFD', 'side_LDD'


def one_layer(params, of_stacked):
  return {name.replace('_L', '_'): of_stacked(params[name]) for name in STACKED}


def in_a_row(params, token_MT):
  """Loss, gradients, and the count of each layer."""

  def loss(params):
    total, counts = 0.0, []
    for token_T in token_MT:
      x_TD = params['embedding_VD'][token_T]
      for l in range(LAYERS):
        x_TD, more, count = layer(one_layer(params, lambda a, l=l: a[l]), x_TD, ALONE)
        total, counts = total + more, [*counts, count]
      total += nats(params['embedding_VD'], x_TD, token_T)
    return total, jnp.stack(counts).reshape(-1, LAYERS).sum(0)

  (total, count_L), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return total, grads, count_L


def stage_of(w, x_TD, token_T, stage, stages):
  """Some layers, the embedding before the first and the head after the last."""
  embedding_VD, layers = w
  zero, count_L = vary(jnp.zeros(()), VARYING), vary(jnp.zeros(LAYERS, jnp.int32), VARYING)
  x_TD = lax.cond(stage == 0, lambda: vary(embedding_VD[token_T], VARYING), lambda: x_TD)
  loss = zero
  for l, one in enumerate(layers):
    x_TD, more, count = layer(one, x_TD, ON_MESH)
    loss, count_L = loss + more, count_L.at[stage * len(layers) + l].set(count)
  last = lambda: vary(nats(embedding_VD, x_TD, token_T), VARYING)
  loss = loss + lax.cond(stage == stages - 1, last, lambda: zero)
  return (x_TD, loss), {'loss': loss, 'count_L': count_L}


def pipelined(schedule, mesh):
  """(params, token_MT) -> loss, gradients and counts on the mesh. Every rank has all layers, and takes its stages'."""
  tensor = SPECS
  each = LAYERS // schedule.stages
  slots = 1 + max(slot for path in schedule.paths for _, slot in path)
  stages = np.array([[schedule.stage_of(rank, slot) for slot in range(slots)] for rank in range(schedule.ranks)])

  def local(params, token_MT):
    params = vary(params, VARYING)
    first_s = jnp.asarray(stages)[lax.axis_index('pipe')] * each
    at = lambda a, l: lax.dynamic_index_in_dim(a, l, 0, keepdims=False)

    def layers_of(stacked):
      """A tree per slot, of layers."""
      return [
        [one_layer(stacked, lambda a, l=l, slot=slot: at(a, first_s[slot] + l)) for l in range(each)]
        for slot in range(slots)
      ]  # fmt: skip

    stacked = {name: params[name] for name in STACKED}
    x_like = vary(jnp.zeros((token_MT.shape[1], D)), VARYING)
    forward = functools.partial(stage_of, stages=schedule.stages)
    roles = [[0] * slots] * schedule.ranks
    found = pipeline.run(schedule, [forward], roles, params['embedding_VD'], layers_of(stacked), token_MT, x_like)
    (grads,) = jax.linear_transpose(layers_of, stacked)(found.layers)
    grads |= {'embedding_VD': found.shared}
    over_all = lambda tree: lax.psum(tree, VARYING)
    return over_all(found.sums['loss']), over_all(grads), over_all(found.sums['count_L'])

  specs = tensor, P(None, BATCH_AXES)
  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), tensor, P())))


def close(actual, expected, tolerance=1e-5):
  assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


CASES = [(name, 4, {}, 8) for name in SCHEDULES]
CASES += [
  ('zb_h1', 4, {'tensor': 2}, 5),
  ('dualpipe_v', 2, {'expert': 2, 'data': 2}, 5),
  ('dualpipe_v', 2, {'expert': 2, 'tensor': 2}, 3),
  ('1f1b', 2, {'expert': 8}, 3),
]


@pytest.mark.parametrize(('name', 'pipe', 'sizes', 'microbatches'), CASES)
def test_equals_the_stages_in_a_row(name, pipe, sizes, microbatches):
  params = parameters()
  tokens = TOKENS * 8
  token_MT = np.random.default_rng(1).integers(0, V, (microbatches, tokens)).astype(np.int32)
  schedule = make(name, pipe, microbatches, Times())
  loss, grads, count_L = pipelined(schedule, mesh_of(pipe, **sizes))(params, token_MT)
  expected_loss, expected, expected_L = jax.jit(in_a_row)(params, token_MT)
  close(loss, expected_loss, 1e-6)
  for name in params:
    close(grads[name], expected[name])
  np.testing.assert_array_equal(count_L, expected_L)


def test_nothing_is_computed_twice():
  """The parts' equations are the whole's; what is alike on all ranks, or light, is made again. W has no collective."""
  mesh, parts = mesh_of(2, expert=2, tensor=2), []

  def local(params, token_T):
    params = vary(params, VARYING)
    layers = [one_layer(params, lambda a, l=l: a[l]) for l in range(2)]
    x_TD, stage = vary(jnp.zeros((len(token_T), D)), VARYING), lax.axis_index('pipe')

    def whole(layers, x_TD, dy_TD):
      forward = lambda layers, x_TD: stage_of((params['embedding_VD'], layers), x_TD, token_T, stage, 2)
      (y_TD, loss), pull, sums = jax.vjp(forward, layers, x_TD, has_aux=True)
      dlayers, dx_TD = pull((dy_TD, jnp.ones_like(loss)))
      return (y_TD, sums), dx_TD, dlayers

    program, shapes = jax.make_jaxpr(whole, return_shape=True)(layers, x_TD, x_TD)
    ends = np.cumsum([len(jax.tree.leaves(shape)) for shape in shapes])
    parts.extend([program, *cut(program, [range(ends[0]), range(ends[0], ends[1]), range(ends[1], ends[2])])[1:]])
    return x_TD

  run = jax.shard_map(local, mesh=mesh, in_specs=(SPECS, P(BATCH_AXES)), out_specs=P(('pipe', *BATCH_AXES)))
  jax.eval_shape(run, parameters(), jnp.zeros(16, jnp.int32))
  program, *of = parts
  varies = lambda part: [
    e
    for e in part.jaxpr.eqns
    if e.primitive.name not in LIGHT and any('pipe' in v.aval.manual_axis_type.varying for v in e.outvars)
  ]
  assert sum(len(varies(part)) for part in of) <= len(varies(program))  # less what no output needs
  products = lambda part: sum(e.primitive.name == 'dot_general' for e in equations(part.jaxpr))
  assert [products(part) for part in of] == [6 + 1, 1 + 6, 6]  # of the layers, and the head's two
  assert sum(map(products, of)) == products(program)
  assert not [e for e in equations(of[2].jaxpr) if e.primitive.name in ('psum', 'psum_invariant', 'all_to_all')]
  assert of[0].takes == ()


def test_a_collective_over_the_pipeline_is_refused():
  """It would wait for ranks that run other cells."""
  mesh, schedule = mesh_of(2), make('gpipe', 2, 2)

  def local(w_DD, x_MTD):
    summed = lambda w, x_TD: vary(lax.psum(x_TD @ w[1], 'pipe'), ('pipe',))
    forward = lambda w, x_TD, _, stage: ((summed(w, x_TD), (x_TD @ w[1]).sum()), stage)
    return pipeline.run(schedule, [forward], [[0], [0]], w_DD, [w_DD], x_MTD, vary(x_MTD[0], VARYING)).shared

  run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, BATCH_AXES)), out_specs=P('pipe'))
  with pytest.raises(ValueError, match=r"collectives over 'pipe': .*psum"):
    jax.eval_shape(run, jnp.ones((D, D)), jnp.ones((2, 4, D)))
