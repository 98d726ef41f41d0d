"""Greedy generation beside transformers' `generate` with the same weights: whole calls, and their decoding alone."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.bench import peers, rows, timing
from moe.config import Config, DataConfig, MeshConfig, TrainConfig
from moe.inference import generate, quantize, weights
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings
from moe.parallel.mesh import make_mesh, platform_of
from moe.parallel.resolved import Resolved
from moe.train import state
from moe.train.checkpoint import flatten
from moe.train.step import resolve

PROMPT, NEW, BATCHES = 128, 128, (1, 32)


def measure(config: Config, repeats: int, devices: int = 1) -> list[dict]:
  """A row per batch and contender: ours in each of `quantize.SCHEMES`, and transformers' where torch is.

  Args:
    config: model and precision.compute.
    repeats: calls, of which the median counts.
    devices: that share a batch, as far as it can be divided.
  """
  config = dataclasses.replace(config, data=DataConfig(), train=TrainConfig(batch_size=devices), mesh=MeshConfig())
  one, *meshes = (make_mesh(_over(config, math.gcd(batch, devices))) for batch in (1, *BATCHES))
  config = resolve(config, one, platform_of(one))
  timing.say('generate: make the weights')
  made = state.create(config, one)
  params, bias_LE = made.params, made.balance['bias_LE']
  del made
  compute = jnp.dtype(config.precision.compute)
  bytes_per_s = memory_bytes_per_s(2**28 if platform_of(one) == 'cpu' else 2**30)
  peer = None
  if not peers.missing():
    timing.say(f'generate: {peers.NAME}, make the model')
    peer = peers.Generation(config, {name: np.asarray(leaf) for name, leaf in flatten(params).items()})
  found = []
  for scheme in quantize.SCHEMES:
    timing.say(f'generate: weights in scheme {scheme}')
    placed = {mesh: jax.device_put((params, bias_LE), NamedSharding(mesh, P())) for mesh in set(meshes)}
    ready = {mesh: weights.prepare(w, bias, config, mesh, scheme) for mesh, (w, bias) in placed.items()}
    del placed
    for batch, mesh in zip(BATCHES, meshes, strict=True):
      name = f'ours {compute.name}' if scheme == 'none' else f'ours {scheme}'
      with rows.attempt(of_batch := {}, name):
        of_batch[name] = ours(ready[mesh], config, mesh, batch, repeats, bytes_per_s)
      found.append({'shape': f'batch {batch}', 'name': name} | of_batch[name])
      timing.say(
        f'generate: {name}, batch {batch}: {of_batch[name].get("decode_tokens_per_s", 0):,.0f} tokens/s decoding'
      )
  for batch in BATCHES if peer else ():
    timing.say(f'generate: {peers.NAME}, batch {batch}')
    found.append({'shape': f'batch {batch}', 'name': peers.NAME} | theirs(peer, config, batch, found))
  return _beside_peer(found)


def _over(config, data: int) -> Config:
  return dataclasses.replace(config, mesh=MeshConfig(data=data))


def ours(ready, config: Resolved, mesh, batch: int, repeats: int, bytes_per_s: float) -> dict:
  """One contender's row. 'of_floor': the time that reading the weights must take, over the time a step takes.

  Args:
    ready: from `weights.prepare`.
    config: of the model, resolved.
    mesh: of the weights.
    batch: sequences at a time.
    repeats: calls, of which the median counts.
    bytes_per_s: at which the memory can be read.
  """
  timing.say(f'generate: batch {batch}, compile')
  settings = Settings(config, Sampling(), eos_ids=(), capacity=PROMPT + NEW, drafts=0)
  generator = generate.Generator(ready, settings, mesh, batch, PROMPT, steps_per_call=NEW - 1)
  call = lambda: generator.run(prompts(config, batch), NEW, range(batch))
  completions, _ = call()
  taken = []
  for _ in range(repeats):
    start = time.perf_counter()
    _, stats = call()
    taken.append((time.perf_counter() - start, stats.decode_s))
  whole_s, decode_s = np.median(taken, axis=0)
  touched = touched_bytes(ready, config, batch)
  return {
    's': float(whole_s),
    'tokens_per_s': batch * NEW / whole_s,
    'decode_tokens_per_s': batch * (NEW - 1) / decode_s,
    'of_floor': touched / bytes_per_s / (decode_s / (NEW - 1)),
    'touched_gb': touched / 1e9,
    'kernels': timing.kernels(generator._decode),
    'tokens': [completion.tokens for completion in completions],
  }


def theirs(peer, config: Config, batch: int, found: list[dict]) -> dict:
  """The peer's row, with the share of ours' tokens that it finds too: all of them, in float32.

  Args:
    peer: a `peers.Generation`.
    config: of the model.
    batch: sequences at a time.
    found: rows of ours; the first of this batch has the tokens that are compared.
  """
  taken = []
  for new in (1, 1, NEW):  # the first call warms up
    start = time.perf_counter()
    token_BS = peer(prompts(config, batch), new)
    taken.append(time.perf_counter() - start)
  _, first_s, whole_s = taken
  mine = next(row for row in found if row['shape'] == f'batch {batch}')
  row = {'s': whole_s, 'tokens_per_s': batch * NEW / whole_s}
  row['decode_tokens_per_s'] = batch * (NEW - 1) / (whole_s - first_s)
  return row | ({'same_tokens': float((token_BS == np.array(mine['tokens'])).mean())} if 'tokens' in mine else {})


def _beside_peer(found):
  rate = {row['shape']: row['decode_tokens_per_s'] for row in found if row['name'] == peers.NAME}
  rest = [{key: value for key, value in row.items() if key != 'tokens'} for row in found]
  ratio = lambda row: {'of_peer': row['decode_tokens_per_s'] / rate[row['shape']]} if row['shape'] in rate else {}
  return [row | (ratio(row) if 'decode_tokens_per_s' in row else {}) for row in rest]


def prompts(config: Config, batch: int) -> list[list[int]]:
  """Random tokens, other ones for each sequence."""
  return np.random.default_rng(0).integers(0, config.model.vocab_size, (batch, PROMPT)).tolist()


def touched_bytes(ready: dict, config: Config, batch: int) -> float:
  """Bytes of the weights that one step reads: all but the embedding, and of the experts those that get a token.

  If each token's experts were drawn at random, a share 1 - (1 - K/E)^B of them would.
  """
  model = config.model
  share = 1 - (1 - model.top_k / model.num_experts) ** batch
  total = 0.0
  for path, leaf in jax.tree.leaves_with_path(ready):
    names = [getattr(key, 'key', '') for key in path]
    if 'mtp' in names or ('w_embedding_VD' in names and not model.tie_embeddings):
      continue
    total += leaf.nbytes * (share if 'experts' in names else 1)
  return total


def memory_bytes_per_s(size: int) -> float:
  """Rate at which an array of `size` float32 values is read, and written again."""
  x, run = jnp.ones(size, jnp.float32), jax.jit(lambda x: x + 1)
  return 2 * x.nbytes / timing.median_s({'': lambda: run(x)}, 9)['']
