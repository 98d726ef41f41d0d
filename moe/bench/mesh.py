"""A train step on each kind of mesh that the devices make, beside one device: what the links between them cost.

All programs are compiled first, side by side, and then run one after the other.
"""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax

from moe.bench import rows, step, timing
from moe.config import Config, MeshConfig

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


def config_of(contender: Contender, base: Config) -> Config:
  train = {'batch_size': contender.batch * base.train.batch_size, **contender.train}
  return dataclasses.replace(
    base, mesh=MeshConfig(**contender.mesh), train=dataclasses.replace(base.train, **train), **contender.more
  )


def compiled(lowered):
  on_cpu = jax.default_backend() == 'cpu'  # where speed says nothing of links, and nobody wants to wait for it
  return lowered.compile({'xla_backend_optimization_level': 0} if on_cpu else None)


def timed(config: Config, program, repeats: int) -> dict:
  """A row: seconds and tokens per second, planned memory of a device, and losses."""
  s, losses = step.run(step.Training(config, step.random_tokens(config), program), repeats)
  step.check(losses, config.model.vocab_size, falling=True)
  shape = {'shape': f'{config.train.batch_size}x{config.data.seq_len}'}
  return shape | step.measured(config, s, losses, timing.memory(program))


def measure(config: Config, repeats: int, only: str = '') -> list[dict]:
  """A row per contender; 'of_linear' is its rate / what one device does times the devices.

  Args:
    config: what one device runs, from `step.sized`.
    repeats: timed steps, of which the median counts.
    only: comma-separated parts of names; those with none of them are left out, but for one device.
  """
  parts, devices = only.split(','), len(jax.devices())
  chosen = {
    name: one for name, one in contenders(devices).items() if name == ONE or any(part in name for part in parts)
  }
  found: dict[str, dict] = {}
  configs = {name: config_of(one, config) for name, one in chosen.items()}
  with ThreadPoolExecutor(len(chosen)) as pool:  # whose end waits for all: nothing compiles beside what is timed
    programs = {}
    for name, one in configs.items():
      with rows.attempt(found, name):
        timing.say(f'trace {name}')
        programs[name] = pool.submit(compiled, step.lower(one))
  for name in list(programs):
    with rows.attempt(found, name):
      timing.say(f'run {name}')
      found[name] = timed(configs[name], programs.pop(name).result(), repeats)
      timing.say(f'{name}: {found[name]["tokens_per_s"]:,.0f} tokens/s')
    gc.collect()  # the state of the one before
  alone = found.get(ONE, {}).get('tokens_per_s')
  linear = lambda row: {'of_linear': row['tokens_per_s'] / (alone * devices)} if alone and 'tokens_per_s' in row else {}
  return [{'name': name} | found[name] | (linear(found[name]) if name != ONE else {}) for name in chosen]
