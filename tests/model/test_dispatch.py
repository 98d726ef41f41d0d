"""Every dispatch backend on every mesh, against naive experts: values and all gradients.

Routings are made by hand, so that one compiled program per backend and mesh serves all loads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from gpus import lower_for_gpu
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.balance.routing import Routing
from moe.config import ModelConfig
from moe.model import layer as layers
from moe.model import resolve
from moe.model.ffn import Experts
from moe.model.parameters import Init
from moe.ops import permute as permutes
from moe.parallel.mesh import BATCH_AXES, abstract_mesh
from moe.parallel.resolved import Resolved
from moe.registry import DISPATCHERS

T, D, F, E, K = 32, 8, 6, 16, 3  # T over the whole mesh
ROW_MULTIPLE = 4  # what experts' rows are padded to; the rest of the suite has 1
MODEL = ModelConfig(d_model=D, d_expert=F, num_experts=E, top_k=K)
LIMITED = dataclasses.replace(MODEL, capacity_factor=1.0)
MESHES = {
  'expert4': {'expert': 4},
  'expert16': {'expert': 16},  # fewer experts per shard than top_k
  'data2_expert2': {'data': 2, 'expert': 2},
  'expert2_tensor2': {'expert': 2, 'tensor': 2},
}
# (backend, mesh, config); ragged runs on the emulation below.
CASES = {
  'local': ('local', {}, MODEL),
  'local-tensor2': ('local', {'tensor': 2}, MODEL),
  'local-data2': ('local', {'data': 2}, MODEL),
  **{f'all_gather-{mesh}': ('all_gather', MESHES[mesh], MODEL) for mesh in MESHES},
  **{f'all_to_all-{mesh}': ('all_to_all', MESHES[mesh], MODEL) for mesh in MESHES},
  **{f'ragged-{mesh}': ('ragged', MESHES[mesh], MODEL) for mesh in ('expert4', 'expert16', 'data2_expert2')},
  'all_gather-limited': ('all_gather', MESHES['expert4'], LIMITED),
  'all_to_all-limited': ('all_to_all', MESHES['expert4'], LIMITED),
  'ragged-limited': ('ragged', MESHES['expert4'], LIMITED),
}


# ------------------------------------------------------------------------------------------------------------- loads


def choose(rng, allowed):
  """K distinct experts per token, out of `allowed`."""
  return np.array([rng.permutation(allowed)[:K] for _ in range(T)])


LOADS = {
  'even': lambda rng: ((np.arange(T)[:, None] * K + np.arange(K)) % E, np.ones((T, K), bool)),
  'uneven': lambda rng: (choose(rng, np.arange(E)), np.ones((T, K), bool)),
  'all_to_the_first': lambda rng: (np.tile([2, 0, 1], (T, 1)), np.ones((T, K), bool)),
  'all_to_the_last': lambda rng: (np.tile([E - 3, E - 1, E - 2], (T, 1)), np.ones((T, K), bool)),
  'every_third_expert': lambda rng: (choose(rng, np.arange(1, E, 3)), np.ones((T, K), bool)),
  'masked': lambda rng: (choose(rng, np.arange(E)), np.repeat(rng.random((T, 1)) < 0.5, K, axis=1)),
  'masked_shards': lambda rng: (choose(rng, np.arange(E)), np.repeat(np.arange(T)[:, None] >= T // 2, K, axis=1)),
  'dropped': lambda rng: (choose(rng, np.arange(E)), rng.random((T, K)) < 0.6),
  'nothing': lambda rng: (choose(rng, np.arange(E)), np.zeros((T, K), bool)),
}


def dense(expert_TK, values_TK):
  out_TE = np.zeros((T, E), values_TK.dtype)
  np.put_along_axis(out_TE, expert_TK, values_TK, axis=1)
  return out_TE


def inputs(load, shards, limited):
  """x, expert, weight, keep, the three expert matrices and the cotangent of the output."""
  rng = np.random.default_rng(abs(sum(map(ord, load))))
  expert_TK, keep_TK = LOADS[load](rng)
  weight_TK = rng.uniform(0.1, 1, size=(T, K))
  if limited:  # capacity holds per shard of tokens
    parts = []
    for part in np.split(np.arange(T), shards):
      capacity = int(np.ceil(LIMITED.capacity_factor * len(part) * K / E))
      kept_TE = oracle.within_capacity(dense(expert_TK, keep_TK)[part], dense(expert_TK, weight_TK)[part], capacity)
      parts.append(np.take_along_axis(kept_TE, expert_TK[part], 1))
    keep_TK = np.concatenate(parts)
  matrices = [rng.normal(size=shape) / 2 for shape in ((E, D, F), (E, D, F), (E, F, D))]
  x_TD, dy_TD = rng.normal(size=(T, D)), rng.normal(size=(T, D))
  to32 = lambda a: a.astype(np.float32)
  return to32(x_TD), expert_TK.astype(np.int32), to32(weight_TK), keep_TK, [to32(m) for m in matrices], to32(dy_TD)


# ---------------------------------------------------------------------------------------------------------- programs


def experts_module(module_of, matrices, config):
  names = ('w_gate_eDF', 'w_up_eDF', 'w_down_eFD')
  return module_of(lambda: Experts(config, Init(nnx.Rngs(0), 1.0)), dict(zip(names, matrices, strict=True)))


def program(name, mesh, config, module_of, matmul='blocked'):
  """(x, weight, matrices, expert, keep) -> y, over the global arrays: dispatch, experts, combine on `mesh`."""
  apply = DISPATCHERS[name]
  rows = P(BATCH_AXES)
  weights = (P('expert', None, 'tensor'), P('expert', None, 'tensor'), P('expert', 'tensor', None))

  def run(x_TD, weight_TK, matrices, expert_TK, keep_TK):
    unused = jnp.zeros((len(x_TD), E))
    routing = Routing(expert_TK, weight_TK, keep_TK, jnp.zeros(E, jnp.int32), unused, unused)
    experts = experts_module(module_of, matrices, config)
    resolved = Resolved(model=config, dispatch=name, grouped_matmul=matmul, row_multiple=ROW_MULTIPLE)
    through_experts = lambda x_MD, size_e: experts(x_MD, size_e, dataclasses.replace(resolved, row_multiple=1))
    return lax.psum(apply(x_TD, routing, through_experts, resolved), 'tensor')

  return jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, weights, rows, rows), out_specs=rows)


def with_gradients(mapped):
  """As `mapped`, with the cotangent of y as a last argument; returns y and the gradients of x, weight, matrices."""

  def run(x_TD, expert_TK, weight_TK, keep_TK, matrices, dy_TD):
    y_TD, pull = jax.vjp(lambda *args: mapped(*args, expert_TK, keep_TK), x_TD, weight_TK, tuple(matrices))
    return y_TD, *pull(dy_TD)

  return run


def emulated_ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups=None
):
  """What jax.lax documents, by gathering everything; NaN where a receiver expects another size than was sent."""
  assert axis_index_groups is None
  gather = lambda a: lax.all_gather(a, axis_name)
  me, row_M, source_s = lax.axis_index(axis_name), jnp.arange(len(output)), jnp.arange(len(send_sizes))
  start_s, size_s, target_s = (gather(a)[:, me] for a in (input_offsets, send_sizes, output_offsets))
  from_sM = (row_M >= target_s[:, None]) & (row_M < (target_s + size_s)[:, None])  # row M comes from shard s
  source_M = (from_sM * source_s[:, None]).sum(0)  # more than one source gives nonsense
  copied = gather(operand).at[source_M, row_M - target_s[source_M] + start_s[source_M]].get(mode='clip')
  output = jnp.where(from_sM.any(0)[:, None], copied, output)
  wrong = jnp.nan if jnp.issubdtype(output.dtype, jnp.floating) else 0x7F  # a byte that FP8 reads as NaN
  return jnp.where((recv_sizes == size_s).all(), output, jnp.asarray(wrong, output.dtype))


@pytest.fixture(scope='module')
def compiled(mesh_of, module_of):
  """The compiled program of a case: every load reuses it."""

  @functools.cache
  def compiled(case):
    name, axes, config = CASES[case]
    # The expert matmuls have tests of their own; ragged_dot compiles faster on CPU.
    matmul = 'blocked' if case in ('local', 'all_to_all-data2_expert2') else 'ragged_dot'
    return jax.jit(with_gradients(program(name, mesh_of(**axes), config, module_of, matmul)))

  return compiled


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize('load', LOADS)
@pytest.mark.parametrize('case', CASES)
def test_equals_naive_experts(case, load, compiled, monkeypatch):
  name, axes, config = CASES[case]
  if name == 'ragged':
    monkeypatch.setattr(lax, 'ragged_all_to_all', emulated_ragged_all_to_all)
  shards = axes.get('data', 1) * axes.get('expert', 1)
  arguments = inputs(load, shards, config is LIMITED)
  y_TD, dx_TD, dweight_TK, dmatrices = compiled(case)(*arguments)

  x, expert, weight, keep, matrices, dy = arguments
  x, weight, dy, matrices = oracle.float64(x), oracle.float64(weight), oracle.float64(dy), map(oracle.float64, matrices)
  operands = (x, dense(expert, weight), dense(expert, keep), *matrices)
  expected_dx, expected_dweight, *expected_dmatrices = oracle.experts_backward(*operands, dy)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(y_TD, oracle.experts(*operands))
  close(dx_TD, expected_dx)
  close(dense(expert, np.asarray(dweight_TK)), expected_dweight)
  for actual, expected in zip(dmatrices, expected_dmatrices, strict=True):
    close(actual, expected)


def test_limited_loads_do_drop():
  """Otherwise the limited cases above would test nothing new."""
  for load in ('uneven', 'all_to_the_first'):
    assert not inputs(load, 4, limited=True)[3].all()


@pytest.mark.parametrize('axes', [(1, 1, 8, 1), (1, 2, 2, 1)])
def test_ragged_lowers_for_gpus(axes, module_of):
  """XLA:CPU has no ragged_all_to_all, so the real thing is traced and lowered for CUDA on a mesh without devices."""
  mesh = abstract_mesh(axes)
  arguments = inputs('uneven', axes[1] * axes[2], limited=False)
  forward = program('ragged', mesh, MODEL, module_of, 'ragged_dot')
  x, expert, weight, keep, matrices, _ = arguments
  exchanges = lambda lowered: lowered.as_text().count('@ragged_all_to_all')
  assert exchanges(lower_for_gpu(jax.jit(forward), x, weight, tuple(matrices), expert, keep, shape=axes)) == 2
  assert exchanges(lower_for_gpu(jax.jit(with_gradients(forward)), *arguments, shape=axes)) == 4


def test_auto_backend():
  assert resolve.dispatcher('auto', 1) == 'local'
  assert resolve.dispatcher('auto', 2) == 'all_gather'
  assert resolve.dispatcher('ragged', 2) == 'ragged'


def test_permute_gradient_is_a_scatter_add():
  rng = np.random.default_rng(0)
  rows, copies, outputs, width = 7, 3, 15, 4
  # Output rows 0..14 copy random input rows, some are empty; the inverse lists, per input row, who copies it.
  source = rng.integers(0, rows, outputs)
  valid = rng.random(outputs) < 0.8
  for row in range(rows):  # at most `copies` per row
    valid[np.flatnonzero((source == row) & valid)[copies:]] = False
  inverse, used = np.zeros((rows, copies), int), np.zeros((rows, copies), bool)
  for row in range(rows):
    listed = np.flatnonzero((source == row) & valid)
    inverse[row, : len(listed)], used[row, : len(listed)] = listed, True
  assert not valid.all()
  assert not used.all()
  x, dy = (jnp.asarray(rng.normal(size=(n, width)), jnp.float32) for n in (rows, outputs))
  permutation = permutes.Permutation(*map(jnp.asarray, (source, valid, inverse, used)))
  y, pull = jax.vjp(lambda x: permutes.permute(x, permutation), x)
  expected = np.zeros(x.shape)
  np.add.at(expected, source[valid], np.asarray(dy)[valid])
  np.testing.assert_array_equal(y, np.asarray(x)[source] * valid[:, None])
  np.testing.assert_allclose(pull(dy)[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('multiple', [1, 4])
def test_rows_of_a_layout(multiple):
  """As many rows are valid as assignments go somewhere, each holds its own, in the order of keys; the rest is room."""
  num_keys, rows = 5, 20
  key_A = np.random.default_rng(0).permutation([0] * 7 + [2] * 4 + [4] * 3 + [num_keys] * 6)  # keys 1 and 3 get none
  layout = permutes.lay_out(jnp.asarray(key_A), num_keys, rows, multiple)
  room = lambda count: -(-count // multiple) * multiple
  wanted = []
  for key in range(num_keys):
    mine = np.flatnonzero(key_A == key).tolist()
    wanted += mine + [None] * (room(len(mine)) - len(mine))
  wanted += [None] * (permutes.padded_rows(rows, num_keys, multiple) - len(wanted))
  assert layout.valid_M.tolist() == [assignment is not None for assignment in wanted]
  assert layout.size.tolist() == [room(count) for count in np.bincount(key_A, minlength=num_keys)[:num_keys]]
  for row, assignment in enumerate(wanted):
    if assignment is not None:
      assert layout.order_M[row] == assignment
      assert layout.place_A[assignment] == row


def test_dropless_calls_of_a_model_with_a_capacity(mesh_of):
  """As evaluation makes them: buffers hold every token, too, though all of them choose the experts of one shard."""
  tight = dataclasses.replace(MODEL, capacity_factor=0.25)
  init = lambda model: layers.MoELayer(model, Init(nnx.Rngs(0), 0.5))
  graph, state = nnx.split(init(MODEL))
  specs = jax.tree.map_with_path(lambda path, _: P('expert') if 'experts' in str(path) else P(), state)
  x_BSD = jax.random.normal(jax.random.key(1), (4, 8, D))
  bias_E, rows = -10.0 * jnp.arange(E), P(BATCH_AXES)

  def output(model):
    config = Resolved(model=model, dispatch='all_to_all', grouped_matmul='ragged_dot', dropless=True)

    def run(state, x_BSD):
      module, mask_BS = nnx.merge(graph, state), jnp.ones(x_BSD.shape[:2], bool)
      return lax.psum(module.mix(x_BSD, mask_BS, bias_E, config)[0], 'tensor')

    return jax.jit(jax.shard_map(run, mesh=mesh_of(expert=4), in_specs=(specs, rows), out_specs=rows))(state, x_BSD)

  np.testing.assert_allclose(output(tight), output(MODEL), rtol=1e-6, atol=1e-6)
