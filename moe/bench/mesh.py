"""A train step on each kind of mesh that the devices make, beside one device: what the links between them cost.

All programs are compiled first, side by side, and then run one after the other.
"""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe.bench import rows, timing
from moe.bench.step import check, random_tokens, run
from moe.config import Config, DataConfig, MeshConfig, ModelConfig, PrecisionConfig
from moe.model import flops
from moe.parallel.mesh import make_mesh, platform_of
from moe.train import state
from moe.train.step import BATCH_SPEC, make_train_step, resolve

ONE = 'one device'


class Contender(NamedTuple):
  """mesh: sizes of axes. batch: sequences, in units of what one device has. train, more: settings of the config."""

  mesh: dict
  batch: int
  train: dict = {}
  more: dict = {}


def contenders(devices: int) -> dict[str, Contender]:
  """By name. Each device has the tokens of one device alone, but for `tensor`, which shares them."""
  found = {ONE: Contender({}, 1)}
  for dispatch in ('all_gather', 'all_to_all', 'ragged'):
    found[f'expert {devices} {dispatch}'] = Contender({'expert': devices}, devices, more={'dispatch': dispatch})
  found[f'data {devices}'] = Contender({'data': devices}, devices)
  found[f'tensor {devices}'] = Contender({'tensor': devices}, 1)
  for schedule in ('1f1b', 'zb_h1', 'dualpipe_v'):
    train = {'schedule': schedule, 'microbatches': 8 * devices}
    found[f'pipe {devices} {schedule}'] = Contender({'pipe': devices}, 4 * devices, train)
  return found


def sized(config: Config, hopper: bool, layers: int) -> Config:
  """What one device runs: `config` with so many layers on Hopper GPUs, a small model of as many elsewhere.

  With a short warm-up, so that the loss moves in a few steps, to a rate that needs no longer one.
  """
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4, warmup_steps=4)
  if hopper:
    model = dataclasses.replace(config.model, num_layers=layers)
    return dataclasses.replace(config, model=model, optimizer=optimizer)
  return dataclasses.replace(
    config,
    model=ModelConfig(vocab_size=512, num_experts=8, top_k=2, num_layers=layers, mtp_depth=0),
    data=DataConfig(seq_len=64),
    precision=PrecisionConfig(),
    optimizer=optimizer,
  )


class Step:
  """One contender's program; `compile` first."""

  def __init__(self, contender: Contender, base: Config):
    train = {'batch_size': contender.batch * base.train.batch_size, **contender.train}
    config = dataclasses.replace(
      base, mesh=MeshConfig(**contender.mesh), train=dataclasses.replace(base.train, **train), **contender.more
    )
    self.mesh = make_mesh(config)
    self.config = resolve(config, self.mesh, platform_of(self.mesh))

  def trace(self) -> None:
    train = self.config.train
    shape = train.microbatches, train.batch_size // train.microbatches, self.config.data.seq_len + 1
    batch = {key: jax.ShapeDtypeStruct(shape, np.int32) for key in ('token_BS', 'segment_BS')}
    self.lowered = make_train_step(self.config, self.mesh).lower(state.abstract(self.config), batch)

  def compile(self) -> None:
    on_cpu = platform_of(self.mesh) == 'cpu'  # where speed says nothing of links, and nobody wants to wait for it
    self.compiled = self.lowered.compile({'xla_backend_optimization_level': 0} if on_cpu else None)

  def measure(self, repeats: int) -> dict:
    """A row: seconds and tokens per second, planned memory of a device, and losses."""
    made = jax.block_until_ready(state.create(self.config, self.mesh))
    token_BS = random_tokens(self.config)
    split = lambda a: a.reshape(self.config.train.microbatches, -1, a.shape[1])
    batch = jax.tree.map(split, {'token_BS': token_BS, 'segment_BS': np.ones_like(token_BS)})
    batch = jax.device_put(batch, NamedSharding(self.mesh, BATCH_SPEC))

    def call():
      nonlocal made
      made, metrics = self.compiled(made, batch)
      return metrics['loss']

    s, losses = run(call, repeats)
    check(losses, self.config.model.vocab_size, falling=True)
    tokens_per_s = token_BS.shape[0] * self.config.data.seq_len / s
    tflop_per_s = tokens_per_s * flops.matmul_flops_per_token(self.config) / 1e12
    row = {
      'shape': f'{token_BS.shape[0]}x{self.config.data.seq_len}',
      's': s,
      'tokens_per_s': tokens_per_s,
      'tflop_per_s': tflop_per_s,
    }
    return row | timing.memory(self.compiled) | {'loss_first': losses[0], 'loss_last': losses[-1]}


def measure(config: Config, repeats: int, only: str = '') -> list[dict]:
  """A row per contender; 'of_linear' is its rate / what one device does times the devices.

  Args:
    config: from `sized`.
    repeats: timed steps, of which the median counts.
    only: comma-separated parts of names; those with none of them are left out, but for one device.
  """
  parts, devices = only.split(','), len(jax.devices())
  chosen = {
    name: one for name, one in contenders(devices).items() if name == ONE or any(part in name for part in parts)
  }
  found: dict[str, dict] = {}
  steps: dict[str, Step] = {}
  for name, one in chosen.items():
    with rows.attempt(found, name):
      timing.say(f'trace {name}')
      steps[name] = Step(one, config)
      steps[name].trace()
  with ThreadPoolExecutor(len(chosen)) as pool:
    compiling = {name: pool.submit(step.compile) for name, step in steps.items() if name not in found}
    for name, done in compiling.items():
      with rows.attempt(found, name):
        done.result()
        timing.say(f'compiled {name}')
  for name in compiling:
    if name not in found:
      with rows.attempt(found, name):
        timing.say(f'run {name}')
        found[name] = steps.pop(name).measure(repeats)
        timing.say(f'{name}: {found[name]["tokens_per_s"]:,.0f} tokens/s')
      gc.collect()  # the state of the one before
  alone = found.get(ONE, {}).get('tokens_per_s')
  linear = lambda row: {'of_linear': row['tokens_per_s'] / (alone * devices)} if alone and 'tokens_per_s' in row else {}
  return [{'name': name} | found[name] | (linear(found[name]) if name != ONE else {}) for name in chosen]
