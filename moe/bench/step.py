"""A whole training step, optimizer included, beside Hugging Face's DeepseekV3ForCausalLM of the same shape.

Each of these models fills most of a GPU's memory, so each contender is a process of its own, one after the other.
"""

import dataclasses
import json
import math
import os
import subprocess
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe.bench import layer, peers, profile, rows, timing
from moe.config import Config, ModelConfig, PrecisionConfig
from moe.model import flops
from moe.parallel.mesh import make_mesh, platform_of
from moe.train import state
from moe.train.step import BATCH_SPEC, make_train_step, resolve

OURS, OURS_FP8 = 'ours', 'ours fp8'
CONTENDERS = (OURS, OURS_FP8, peers.NAME)
LIMIT_S = 300  # of one contender
FAR_FROM_UNIFORM = 0.6  # nats by which an untrained model's loss may be away from ln(vocabulary)


def sized(config: Config, platform: str) -> Config:
  """What is run: `config` on a Hopper GPU, a small model of the same make elsewhere.

  With a short warm-up, so that the loss moves in a few steps, to a rate that needs no longer one.
  """
  if platform != 'hopper':
    config = dataclasses.replace(
      config,
      model=ModelConfig(vocab_size=512, num_experts=8, top_k=2, num_layers=3, mtp_depth=0),
      data=dataclasses.replace(config.data, seq_len=64),
      precision=PrecisionConfig(),
    )
  return dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-4, warmup_steps=4)
  )


def collect(config: Config, names, command, dense_tflop_per_s: float) -> list[dict]:
  """A row per contender, each from a process that ends with its row, as JSON, on stdout.

  Args:
    config: from `sized`.
    names: of CONTENDERS.
    command: name -> arguments of the process.
    dense_tflop_per_s: rate of a dense product on the same machine.
  """
  found: dict[str, dict[str, Any]] = {}
  for name in names:
    with rows.attempt(found, name):
      timing.say(f'step: {name}, in its own process')
      # Ours takes its memory at once, as in training; torch needs what jax would take beside it.
      memory = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false' if name == peers.NAME else 'true'}
      environ = os.environ | memory | {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'}
      done = subprocess.run(command(name), env=environ, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True)
      row = json.loads(done.stdout.strip().splitlines()[-1])
      found[name] = row | {'of_dense': row['tflop_per_s'] / dense_tflop_per_s}
  shape = f'{config.train.batch_size}x{config.data.seq_len} tokens'
  return rows.beside_peer([{'shape': shape, 'name': name} | row for name, row in found.items()], peers.NAME)


def contender(name: str, config: Config, repeats: int, profiled: bool = False) -> dict:
  """The row of one contender, measured in this process; AssertionError if its losses are not those of a training.

  Args:
    name: of CONTENDERS.
    config: from `sized`.
    repeats: timed steps, of which the median counts.
    profiled: list the kernels that take longest, if it is ours.
  """
  token_BS = random_tokens(config)
  call: peers.Training | Training
  if name == peers.NAME:
    timing.say(f'{name}: make the model')
    call = peers.Training(config, token_BS)
    found = {
      'state': f'weights, gradients, moments {config.precision.compute}',
      'kernels': 'torch grouped_mm, sdpa, fused AdamW',
    }
  else:
    fp8 = layer.FP8 if name == OURS_FP8 else ''
    config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, fp8=fp8))
    call = ours = Training(config, token_BS)
    found = {
      'state': f'masters float32, moments {config.optimizer.moments}, compute {config.precision.compute}',
      'kernels': timing.kernels(ours.compiled),
    }
  timing.say(f'{name}: steps')
  s, losses = run(call, repeats)
  check(losses, config.model.vocab_size, falling=name != peers.NAME)
  row = measured(config, s, losses, call.memory()) | found
  return row | ({'profile': profile.top_kernels(call)} if profiled and name != peers.NAME else {})


def run(call, repeats: int) -> tuple[float, list[float]]:
  """(median seconds of a step, losses of all steps): two to warm up, then `repeats`."""
  losses, times = [], []
  for _ in range(2 + repeats):
    start = time.perf_counter()
    losses.append(float(call()))
    times.append(time.perf_counter() - start)
  return float(np.median(times[2:])), losses


def measured(config: Config, s: float, losses: list[float], memory: dict) -> dict:
  """A row's entries on timed steps.

  Args:
    config: of the run.
    s: seconds of a step.
    losses: of all steps.
    memory: entries from `Training.memory` or `timing.memory`.
  """
  tokens_per_s = config.train.batch_size * config.data.seq_len / s
  rate = tokens_per_s * flops.matmul_flops_per_token(config) / 1e12
  row = {'s': s, 'tokens_per_s': tokens_per_s, 'tflop_per_s': rate, **memory}
  return row | {'loss_first': losses[0], 'loss_last': losses[-1]}


def check(losses: list[float], vocab_size: int, falling: bool) -> None:
  """An untrained model knows nothing of random tokens, and learns the batch it sees again and again."""
  assert np.isfinite(losses).all(), losses
  assert abs(losses[0] - math.log(vocab_size)) < FAR_FROM_UNIFORM, f'{losses[0]} is far from ln {vocab_size}'
  assert losses[-1] < losses[0] or not falling, f'the loss does not fall: {losses}'


def random_tokens(config: Config) -> np.ndarray:
  """int32 [B, S + 1]."""
  size = config.train.batch_size, config.data.seq_len + 1
  return np.random.default_rng(0).integers(0, config.model.vocab_size, size, np.int32)


def lower(config: Config):
  """The train step of a config on its mesh, traced and lowered, for `Training`. Raises UserError as `make_mesh`."""
  mesh = make_mesh(config)
  config = resolve(config, mesh, platform_of(mesh))
  train = config.train
  shape = train.microbatches, train.batch_size // train.microbatches, config.data.seq_len + 1
  batch = {key: jax.ShapeDtypeStruct(shape, np.int32) for key in ('token_BS', 'segment_BS')}
  return make_train_step(config, mesh).lower(state.abstract(config), batch)


class Training:
  """Our training on one batch. A call is one step and returns its loss, float32 [].

  Args:
    config: of the run.
    token_BS: int32, the batch.
    compiled: from `lower`, or None to compile here.
  """

  def __init__(self, config: Config, token_BS: np.ndarray, compiled=None):
    mesh = make_mesh(config)
    config = resolve(config, mesh, platform_of(mesh))
    timing.say('ours: make the state')
    self.state = jax.block_until_ready(state.create(config, mesh))
    batch = {'token_BS': token_BS, 'segment_BS': np.ones_like(token_BS)}
    split = lambda a: a.reshape(config.train.microbatches, -1, a.shape[1])
    self.batch = jax.device_put(jax.tree.map(split, batch), NamedSharding(mesh, BATCH_SPEC))
    if compiled is None:
      timing.say('ours: compile')
      compiled = lower(config).compile()
    self.compiled = compiled

  def __call__(self):
    self.state, metrics = self.compiled(self.state, self.batch)
    return metrics['loss']

  def memory(self) -> dict:
    """A row's entries on the peak memory so far, or, on a CPU, on what XLA planned."""
    stats = jax.devices()[0].memory_stats()
    if not stats:
      return timing.memory(self.compiled)
    return {'peak_gib': stats['peak_bytes_in_use'] / timing.GIB, 'peak_by': 'memory_stats: peak_bytes_in_use'}
