"""Forward + backward of a MoE layer, router to combine, beside Hugging Face's with the same weights and tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe.bench import peers, profile, rows, timing
from moe.config import Config, ModelConfig, PrecisionConfig
from moe.model import layer as layers
from moe.model.parameters import Init, is_float32
from moe.parallel.mesh import make_mesh, platform_of
from moe.train.step import resolve

FP8 = 'experts,ffn'
CHECKED = 128  # tokens that are compared with the reference
# Frobenius norms of the errors. FP8's own rounding is 3.7% of each product, and a gradient passes five of them.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.02, 'fp8': 0.15}
# The peer adds up a token's experts in bf16, and a few tokens that are as near to two experts go to the other one.
PEER_TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.1}


class Shape(NamedTuple):
  """T tokens of width D to K of E experts of hidden width F, and to `shared` ones that take all tokens."""

  D: int
  F: int
  E: int
  K: int
  T: int
  shared: int = 1

  def __str__(self):
    named = ' '.join(f'{key}{value}' for key, value in self._asdict().items() if key != 'shared')
    return named if self.shared == 1 else f'{named} shared{self.shared}'

  @property
  def model(self) -> ModelConfig:
    return ModelConfig(
      d_model=self.D, d_expert=self.F, num_experts=self.E, top_k=self.K, num_shared_experts=self.shared
    )

  @property
  def tflop(self) -> float:
    """Of the matrix products, forward and twice that backward: three per expert, and the router."""
    return 3 * 2 * self.T * (3 * self.D * self.F * (self.K + self.shared) + self.D * self.E) / 1e12


GPU_SHAPES = (Shape(7168, 2048, 32, 8, 8192), Shape(2048, 1408, 64, 6, 16384), Shape(1024, 512, 64, 6, 32768))
CPU_SHAPES = (Shape(256, 128, 16, 4, 2048),)


class Inputs(NamedTuple):
  """weights: nested dict of a MoELayer's parameters. x_TD: tokens. dy_TD: the gradient that comes back."""

  weights: dict
  x_TD: jax.Array
  dy_TD: jax.Array


def measure(
  shape: Shape, compute: str, dense_tflop_per_s: float, repeats: int, inner: int, profiled: bool = False
) -> list[dict]:
  """A row per contender: ours, ours in FP8 and, where torch and transformers are, Hugging Face's.

  Args:
    shape: of the layer and its tokens.
    compute: 'float32' or 'bfloat16'.
    dense_tflop_per_s: rate of a dense product on the same machine.
    repeats, inner: as of `timing.median_s`.
    profiled: list the kernels that take longest in our rows.
  """
  say = lambda what: timing.say(f'layer {shape}: {what}')
  inputs = make_inputs(shape, compute)
  found: dict[str, dict[str, Any]] = {}
  calls: dict[str, Callable] = {}
  plain = f'ours {compute}'.replace('bfloat', 'bf')
  for name, fp8 in ((plain, ''), ('ours fp8', FP8)):
    with rows.attempt(found, name):
      say(f'{name}: compile and check')
      compiled = build(shape, inputs, compute, fp8)
      errors = check(compiled, shape, inputs, TOLERANCE['fp8' if fp8 else compute])
      calls[name] = functools.partial(compiled, *inputs)
      found[name] = timing.memory(compiled) | errors | {'kernels': timing.kernels(compiled)}
  if not peers.missing():
    with rows.attempt(found, peers.NAME):
      say(f'{peers.NAME}: make and check')
      peer = peers.Layer(shape.model, *inputs, compute)
      errors = check_peer(peer, calls.get(plain), PEER_TOLERANCE[compute])
      found[peers.NAME] = peer.memory() | errors | {'kernels': 'torch grouped_mm'}
      calls[peers.NAME] = peer
  say('timing')
  for name, s in timing.median_s(calls, repeats, inner).items():
    rate = shape.tflop / s
    found[name] = {'s': s, 'tflop_per_s': rate, 'of_dense': rate / dense_tflop_per_s} | found[name]
    say(f'{name}: {s * 1e3:.2f} ms, {rate:.3g} TFLOP/s')  # a run that is cut off later has said this much
    if profiled and name.startswith('ours'):
      say(f'{name}: profile')
      found[name]['profile'] = profile.top_kernels(calls[name])
  return rows.beside_peer([{'shape': str(shape), 'name': name} | row for name, row in found.items()], peers.NAME)


def make_inputs(shape: Shape, compute: str) -> Inputs:
  """Random weights and tokens. The router's weights are float32 as in training, of values that bf16 holds, too."""

  @jax.jit
  def make():
    weights = nnx.to_pure_dict(nnx.split(layers.MoELayer(shape.model, Init(nnx.Rngs(0), 0.02)))[1])
    cast = lambda path, w: w.astype(compute).astype('float32' if is_float32(path[-1].key) else compute)
    x_TD, dy_TD = (jax.random.normal(key, (shape.T, shape.D), compute) for key in jax.random.split(jax.random.key(0)))
    return Inputs(jax.tree.map_with_path(cast, weights), x_TD, dy_TD)

  return make()


def build(shape: Shape, inputs: Inputs, compute: str, fp8: str = ''):
  """The compiled (weights, x_TD, dy_TD) -> (y_TD, (gradient of the weights, dx_TD)).

  Args:
    shape: of the layer and its tokens.
    inputs: of `make_inputs`; their values do not matter.
    compute: 'float32' or 'bfloat16'.
    fp8: modules that multiply in FP8, as precision.fp8 names them.
  """
  config = Config(model=shape.model, precision=PrecisionConfig(compute=compute, fp8=fp8))
  mesh = make_mesh(config)
  config = resolve(config, mesh, platform_of(mesh))
  graph, abstract = nnx.split(nnx.eval_shape(lambda: layers.MoELayer(shape.model, Init(nnx.Rngs(0), 0.02))))

  def product_with_dy(weights, x_TD, dy_TD):
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, weights)
    mask_BS, bias_E = jnp.ones((1, shape.T), bool), jnp.zeros(shape.E)
    y_BSD, _ = nnx.merge(graph, state).mix(x_TD[None], mask_BS, bias_E, config)
    y_TD = lax.psum(y_BSD[0], 'tensor')
    return (y_TD.astype(jnp.float32) * dy_TD.astype(jnp.float32)).sum(), y_TD

  def run(weights, x_TD, dy_TD):
    (_, y_TD), grads = jax.value_and_grad(product_with_dy, argnums=(0, 1), has_aux=True)(weights, x_TD, dy_TD)
    return y_TD, grads

  return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P())).lower(*inputs).compile()


def check(compiled, shape: Shape, inputs: Inputs, tolerance: float) -> dict:
  """Errors of output and gradients against float32, of the first CHECKED tokens. AssertionError if they are too large.

  No gradient comes back to the other tokens, so that the weights' gradient is of the first ones alone.

  Args:
    compiled: of `build`.
    shape: of the layer and its tokens.
    inputs: that it is called with, but for the gradients of tokens past CHECKED.
    tolerance: the most that the norm of an error may be of that of what it should be.
  """
  n = min(CHECKED, shape.T)
  dy_TD = jnp.where(jnp.arange(shape.T)[:, None] < n, inputs.dy_TD, 0)
  y_TD, (dw, dx_TD) = compiled(inputs.weights, inputs.x_TD, dy_TD)
  y_nD, (want_dw, dx_nD) = reference(inputs.weights, inputs.x_TD[:n], dy_TD[:n], shape.K)
  errors = {'error_y': relative(y_TD[:n], y_nD), 'error_dx': relative(dx_TD[:n], dx_nD)}
  used = [key for key in ('w_router_DE', 'experts', 'shared') if key in inputs.weights]
  pairs = zip(*(jax.tree.leaves({key: tree[key] for key in used}) for tree in (dw, want_dw)), strict=True)
  errors['error_dw'] = max(relative(got, want) for got, want in pairs)
  assert max(errors.values()) < tolerance, f'{errors}, and {tolerance} is allowed'
  return errors


def check_peer(peer: peers.Layer, ours, tolerance: float) -> dict:
  """How far the peer is from ours, {} if ours failed. AssertionError if it does not compute the same."""
  if not ours:
    return {}
  y_TD, (dw, dx_TD) = ours()
  pairs = zip(peer.outputs(), (y_TD, dx_TD, dw['experts']['w_down_eFD'][0]), strict=True)
  errors = {f'to_ours_{key}': relative(got, want) for key, (got, want) in zip(('y', 'dx', 'dw'), pairs, strict=True)}
  assert max(errors.values()) < tolerance, f'{errors}, and {tolerance} is allowed'
  return errors


# Tuning the kernels of a function that runs once takes longer than running it.
@functools.partial(jax.jit, static_argnums=3, compiler_options={'xla_gpu_autotune_level': 0})
def reference(weights: dict, x_TD: jax.Array, dy_TD: jax.Array, top_k: int):
  """The same in float32 by another way: every expert takes all tokens, and most gates are 0.

  Args:
    weights: nested dict of a MoELayer's parameters.
    x_TD: tokens.
    dy_TD: the gradient that comes back.
    top_k: experts per token.
  """

  def swiglu(x_TD, gate_DF, up_DF, down_FD):
    return (jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)) @ down_FD

  def product_with_dy(weights, x_TD):
    scores_TE = jax.nn.sigmoid(x_TD @ weights['w_router_DE'])
    least_T1 = lax.top_k(scores_TE, top_k)[0][:, -1:]
    gate_TE = jnp.where(scores_TE >= least_T1, scores_TE, 0)
    gate_TE = gate_TE / gate_TE.sum(-1, keepdims=True)
    experts = weights['experts']

    @jax.checkpoint
    def add(y_TD, of_expert):
      gate_T, *matrices = of_expert
      return y_TD + gate_T[:, None] * swiglu(x_TD, *matrices), None

    y_TD = jnp.zeros_like(x_TD)
    if shared := weights.get('shared'):
      y_TD = swiglu(x_TD, shared['w_gate_DF'], shared['w_up_DF'], shared['w_down_FD'])
    y_TD, _ = lax.scan(add, y_TD, (gate_TE.T, experts['w_gate_eDF'], experts['w_up_eDF'], experts['w_down_eFD']))
    return (y_TD * dy_TD).sum(), y_TD

  weights, x_TD, dy_TD = jax.tree.map(lambda a: a.astype(jnp.float32), (weights, x_TD, dy_TD))
  with jax.default_matmul_precision('highest'):
    (_, y_TD), grads = jax.value_and_grad(product_with_dy, argnums=(0, 1), has_aux=True)(weights, x_TD)
  return y_TD, grads


def relative(got, want) -> float:
  """|got - want| / |want|, Frobenius; NaN, which no tolerance admits, if either is not finite."""
  got, want = (jnp.asarray(a, jnp.float32) for a in (got, want))
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
