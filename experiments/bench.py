"""Measures the pieces that decide the speed of a MoE layer, after checking them.

python experiments/bench.py --suite=gemm
python experiments/bench.py --suite=layer

gemm: forward + backward of the grouped matmul's backends beside one dense matmul of the same FLOPs.
layer: forward + backward of a MoE layer, router to combine, over the number of experts at fixed tokens and top-k.
"""

import functools
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe import cli
from moe.config import Config, ModelConfig
from moe.mesh import make_mesh
from moe.model import layer as layers
from moe.model.parameters import Init
from moe.ops.grouped_matmul import BACKENDS, grouped_matmul
from moe.step import resolve

SUITE = flags.DEFINE_enum('suite', 'gemm', ('gemm', 'layer'), 'What to measure.')
REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed repetitions; the median counts.', lower_bound=1)
ROWS = flags.DEFINE_integer('rows', 16384, 'gemm: rows. layer: rows = tokens * top-k.', lower_bound=1)
EXPERTS = flags.DEFINE_integer('experts', 64, 'gemm: groups.', lower_bound=1)
WIDTH = flags.DEFINE_integer('width', 256, 'Model width D.', lower_bound=1)
HIDDEN = flags.DEFINE_integer('hidden', 128, 'Expert width F.', lower_bound=1)
TOP_K = flags.DEFINE_integer('top_k', 4, 'layer: experts per token.', lower_bound=1)
JSON = flags.DEFINE_string('json', '', 'Also write the results to this file.')


def medians_s(calls) -> list[float]:
  """Median seconds of each of these jitted calls, warmed up; taken in turn, so that all meet the same noise."""
  for call in calls:
    jax.block_until_ready(call())
  times = [[] for _ in calls]
  for _ in range(REPEATS.value):
    for call, taken in zip(calls, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(call())
      taken.append(time.perf_counter() - start)
  return [float(np.median(taken)) for taken in times]


def gemm() -> list[dict]:
  """Times of dense and grouped matmuls, forward, input gradient and weight gradient together."""
  rng = np.random.default_rng(0)
  M, E, D, F = ROWS.value, EXPERTS.value, WIDTH.value, HIDDEN.value
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  x_MD, w_eDF, dy_MF = draw(M, D), draw(E, D, F), draw(M, F)
  size_e = jnp.asarray(rng.multinomial(M, rng.dirichlet(np.full(E, 4.0))), jnp.int32)

  def grads(product):
    return jax.jit(lambda x, w, dy: (lambda y, pull: (y, *pull(dy)))(*jax.vjp(product, x, w)))

  expert_M = np.repeat(np.arange(E), size_e)
  want = np.einsum('md,mdf->mf', np.asarray(x_MD[::97], np.float64), np.asarray(w_eDF, np.float64)[expert_M[::97]])
  calls = {'dense': functools.partial(grads(jnp.matmul), x_MD, w_eDF[0], dy_MF)}
  for name in BACKENDS:
    run = grads(lambda x, w, name=name: grouped_matmul(x, w, size_e, name))
    np.testing.assert_allclose(run(x_MD, w_eDF, dy_MF)[0][::97], want, rtol=1e-3, atol=1e-3)
    calls[name] = functools.partial(run, x_MD, w_eDF, dy_MF)
  times_s = medians_s(calls.values())
  return [
    {'name': name, 's': s, 'gflop_per_s': 6 * M * D * F / s / 1e9, 'of_dense': times_s[0] / s}
    for name, s in zip(calls, times_s, strict=True)
  ]


def layer() -> list[dict]:
  """Times of a MoE layer with 16 to 128 experts."""
  rng = np.random.default_rng(0)
  D, K = WIDTH.value, TOP_K.value
  tokens = ROWS.value // K
  x_BSD = jnp.asarray(rng.standard_normal((1, tokens, D)), jnp.float32)
  mask_BS, calls = jnp.ones((1, tokens), bool), {}
  for experts in (16, 32, 64, 128):
    config = Config(
      model=ModelConfig(d_model=D, d_expert=HIDDEN.value, num_experts=experts, top_k=K, num_shared_experts=0)
    )
    mesh = make_mesh(config)
    config = resolve(config, mesh, jax.default_backend())
    module, weights = _split(config.model)

    def output_sum(weights, x_BSD, module=module, config=config):
      bias_E = jnp.zeros(config.model.num_experts)
      y_BSD, _ = layers.moe_block(module(weights), x_BSD, mask_BS, bias_E, config, dropless=False)
      return jax.lax.psum((y_BSD * y_BSD).sum(), 'tensor')

    run = jax.jit(jax.shard_map(jax.grad(output_sum, argnums=(0, 1)), mesh=mesh, in_specs=P(), out_specs=P()))
    calls[f'{experts} experts'] = functools.partial(run, weights, x_BSD)
  times_s = medians_s(calls.values())
  return [{'name': name, 's': s, 'of_16_experts': s / times_s[0]} for name, s in zip(calls, times_s, strict=True)]


def _split(model):
  graph, state = nnx.split(layers.MoELayer(model, Init(nnx.Rngs(0), 0.02)))
  return (lambda state: nnx.merge(graph, state)), state


def main(argv):
  del argv
  results = {'gemm': gemm, 'layer': layer}[SUITE.value]()
  for row in results:
    print('  '.join(f'{key} {value:.4g}' if isinstance(value, float) else f'{value:14}' for key, value in row.items()))
  print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores')
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps({'suite': SUITE.value, 'results': results}, indent=2))


if __name__ == '__main__':
  cli.run(main)
