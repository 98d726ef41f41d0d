"""Forward + backward of a MoE layer, router to combine, over the number of experts at fixed tokens and top-k."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe.bench import timing
from moe.config import Config, ModelConfig, PrecisionConfig
from moe.mesh import make_mesh, platform_of
from moe.model import layer as layers
from moe.model.parameters import Init
from moe.step import resolve


def measure(model: ModelConfig, tokens: int, experts, compute: str, repeats: int, inner: int) -> list[dict]:
  """A row per number of experts; `model` gives the widths and top-k, `compute` the dtype."""
  made = {count: build(dataclasses.replace(model, num_experts=count), tokens, compute) for count in experts}
  times_s = timing.median_s({n: functools.partial(*call) for n, call in made.items()}, repeats, inner)
  # Router, then three products of K experts and the shared ones, forward and twice that backward.
  expert_flops = 6 * model.d_model * model.d_expert * (model.top_k + model.num_shared_experts)
  return [
    {
      'name': f'{count} experts',
      's': s,
      'tflop_per_s': 3 * tokens * (expert_flops + 2 * model.d_model * count) / s / 1e12,
      f'of_{experts[0]}_experts': s / times_s[experts[0]],
      'kernels': timing.kernels(made[count][0]),
    }
    for count, s in times_s.items()
  ]


def build(model: ModelConfig, tokens: int, compute: str):
  """(compiled gradient of a layer's squared output, weights, tokens) with random weights."""
  config = Config(model=model, precision=PrecisionConfig(compute=compute))
  mesh = make_mesh(config)
  config = resolve(config, mesh, platform_of(mesh))
  graph, state = nnx.split(layers.MoELayer(model, Init(nnx.Rngs(0), 0.02)))
  weights = jax.tree.map(lambda w: w.astype(compute), state)
  x_BSD = jax.random.normal(jax.random.key(0), (1, tokens, model.d_model), compute)
  mask_BS = jnp.ones((1, tokens), bool)

  def squares(weights, x_BSD):
    bias_E = jnp.zeros(model.num_experts)
    y_BSD, _ = layers.moe_block(nnx.merge(graph, weights), x_BSD, mask_BS, bias_E, config, dropless=False)
    return jax.lax.psum((y_BSD.astype(jnp.float32) ** 2).sum(), 'tensor')

  run = jax.shard_map(jax.grad(squares, argnums=(0, 1)), mesh=mesh, in_specs=P(), out_specs=P())
  return jax.jit(run).lower(weights, x_BSD).compile(), weights, x_BSD
