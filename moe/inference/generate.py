"""Generation from a batch of prompts: the host's side.

The same request gets the same tokens in every slot, batch and mesh, but for what rounding decides: its draws depend on
its seed and on positions alone, and routing is dropless.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.errors import UserError
from moe.inference import forward, steps
from moe.inference.sampling import Sampling
from moe.inference.steps import NO_TOKEN, Emitted, Settings, Slots
from moe.inference.weights import prepare, specs
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved


class Completion(NamedTuple):
  """tokens: what was generated, without the token that ends. finish: 'end', 'length' or 'stopped' (by the caller)."""

  tokens: list[int]
  finish: str


class Stats(NamedTuple):
  """Of one `Generator.run`.

  prefill_s: until every prompt had its first token; decode_s: for the decoded_tokens after these. device_steps: passes
  of the model. checked: drafts checked; accepted_k: how many of them stayed, by their place.
  """

  prefill_s: float
  decode_s: float
  prompt_tokens: int
  decoded_tokens: int
  device_steps: int
  checked: int
  accepted_k: list[int]

  def __str__(self):
    rate = self.decoded_tokens / self.decode_s if self.decode_s else 0.0
    text = f'{self.prompt_tokens:,} prompt tokens in {self.prefill_s:.2f} s; {self.decoded_tokens:,} tokens decoded in '
    text += f'{self.decode_s:.2f} s, {rate:,.0f} tokens/s'
    if self.checked:
      shares = ', '.join(f'{accepted / self.checked:.0%}' for accepted in self.accepted_k)
      text += (
        f'; drafts accepted, by position: {shares}; {self.decoded_tokens / self.checked:.2f} tokens per step and slot'
      )
    return text


class Generator:
  """Compiled generation on one mesh, for a number of slots and a length of the cache."""

  def __init__(
    self, weights: dict, settings: Settings, mesh, slots: int, prompt_chunk: int = 128, steps_per_call: int = 16
  ):
    """Compiles nothing yet.

    Args:
      weights: from `weights.prepare`.
      settings: its config has every 'auto' resolved (`moe.train.step.resolve`).
      mesh: of the weights.
      slots: sequences at a time; rounded up to a multiple of the mesh's batch shards.
      prompt_chunk: tokens of a prompt that run at a time.
      steps_per_call: decoding steps between two visits to the host.

    Raises:
      UserError: drafts without an MTP module.
    """
    model = settings.config.model
    if settings.drafts and not model.mtp_depth:
      raise UserError('speculative decoding needs a model with an MTP module; this one has model.mtp_depth = 0')
    shards = mesh.shape['data'] * mesh.shape['expert']
    self.slots = -(-slots // shards) * shards
    self.weights, self.settings, self.mesh = weights, settings, mesh
    self.prompt_chunk, self.steps_per_call = prompt_chunk, steps_per_call
    self._batch = NamedSharding(mesh, P(BATCH_AXES))
    self._empty_cache = self._cache_maker()
    step = steps.speculate if settings.drafts else steps.decode

    def decode(w, slots):
      return lax.scan(lambda slots, _: step(w, slots, settings), slots, length=steps_per_call)

    prefill = lambda w, slots, token_BS, count_B, ends_B: steps.prefill(w, slots, token_BS, count_B, ends_B, settings)
    self._prefill = self._jit(prefill, (P(BATCH_AXES),) * 3, self._slots_spec())
    self._decode = self._jit(decode, (), (self._slots_spec(), Emitted._make([P(None, BATCH_AXES)] * 2)))

  def run(
    self,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    seeds: Sequence[int],
    on_tokens: Callable[[int, list[int]], bool] = lambda row, tokens: False,
  ) -> tuple[list[Completion], Stats]:
    """Continues every prompt by up to `max_tokens` tokens.

    Args:
      prompts: token ids.
      max_tokens: at least 1.
      seeds: of each prompt's draws, 0 to 2^32 - 1.
      on_tokens: called with the number of a prompt and its newest tokens, as they come; True ends that sequence. Where
        there are several processes, each calls it with the same, and must get the same answer.

    Raises:
      UserError: as `check_request`.
    """
    check_request(prompts, max_tokens, seeds, self.slots, self.settings)
    found: list[list[int]] = [[] for _ in prompts]
    finish = [''] * len(prompts)

    def take(row, tokens):
      tokens = [int(token) for token in tokens if token != NO_TOKEN]
      if finish[row] or not tokens:
        return
      ended = tokens[-1] in self.settings.eos_ids
      found[row] += tokens[: len(tokens) - ended]
      stopped = on_tokens(row, tokens[: len(tokens) - ended])
      finish[row] = 'end' if ended else 'stopped' if stopped else 'length' if len(found[row]) == max_tokens else ''

    slots, chunks = self._empty(prompts, max_tokens, seeds), self._chunks(prompts)
    self._compile(slots, chunks[0])
    start, accepted = time.perf_counter(), []
    for chunk in chunks:
      slots = self._prefill(self.weights, slots, *chunk)
    for row, token in enumerate(_fetch(slots.token_B)[: len(prompts)]):
      take(row, [token])
    prefilled, first = time.perf_counter(), sum(map(len, found))
    while not all(finish):
      slots, emitted = self._decode(self.weights, slots)
      emitted = jax.tree.map(_fetch, emitted)
      accepted.append(emitted.accepted_B[:, : len(prompts)].ravel())
      for row in range(len(prompts)):
        take(row, emitted.token_BK[:, row].ravel())
      if 'stopped' in finish:
        live_B = np.arange(self.slots) < len(prompts)
        live_B[: len(prompts)] &= [not reason for reason in finish]
        slots = slots._replace(live_B=self._put(live_B))
    decode_s = time.perf_counter() - prefilled
    checked = np.concatenate([accepted_B[accepted_B >= 0] for accepted_B in accepted or [np.zeros(0, int)]])
    stats = Stats(
      prefill_s=prefilled - start,
      decode_s=decode_s,
      prompt_tokens=sum(map(len, prompts)),
      decoded_tokens=sum(map(len, found)) - first,
      device_steps=len(accepted) * self.steps_per_call,
      checked=len(checked),
      accepted_k=[int((checked > place).sum()) for place in range(self.settings.drafts)],
    )
    return [Completion(*pair) for pair in zip(found, finish, strict=True)], stats

  def _compile(self, slots, chunk):
    """So that no clock is running while it happens."""
    if isinstance(self._decode, jax.stages.Wrapped):
      self._prefill = self._prefill.lower(self.weights, slots, *chunk).compile()
      self._decode = self._decode.lower(self.weights, slots).compile()

  def _chunks(self, prompts) -> list[tuple]:
    """(token_BS and the token after it, for the MTP module; tokens of each slot; whether its prompt ends) per chunk."""
    size, length_B = self.prompt_chunk, np.zeros(self.slots, np.int32)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    count = -(-int(length_B.max()) // size)
    token_BS = np.zeros((self.slots, count * size + 1), np.int32)
    for row, prompt in zip(token_BS, prompts, strict=False):
      row[: len(prompt)] = prompt
    found = []
    for first in range(0, count * size, size):
      count_B = np.clip(length_B - first, 0, size)
      ends_B = (count_B > 0) & (first + count_B == length_B)
      found.append(tuple(map(self._put, (token_BS[:, first : first + size + 1], count_B, ends_B))))
    return found

  def _empty(self, prompts, max_tokens, seeds) -> Slots:
    """Slots for these prompts, before the first chunk."""
    config, drafts = self.settings.config, self.settings.drafts
    zero_B = np.zeros(self.slots, np.int32)
    last_B, seed_B = zero_B.copy(), zero_B.astype(np.uint32)
    seed_B[: len(prompts)] = seeds
    last_B[: len(prompts)] = [len(prompt) + max_tokens - 1 for prompt in prompts]
    hidden_BKD = np.zeros((self.slots, drafts + 1, config.model.d_model), jnp.dtype(config.precision.compute))
    next_BK = np.zeros((self.slots, drafts + 1), np.int32)
    host = Slots._make([zero_B, zero_B, zero_B > 0, last_B, seed_B, hidden_BKD, next_BK, zero_B, ()])
    return jax.tree.map(self._put, host)._replace(cache=self._empty_cache())

  def _cache_maker(self):
    """A compiled function that makes an empty cache."""
    shapes = forward.cache_shapes(self.settings.config, self.slots, self.settings.capacity, self.settings.drafts > 0)
    place = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._slots_spec().cache)
    make = lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
    return jax.jit(make, out_shardings=place)

  def _slots_spec(self) -> Slots:
    one = P(BATCH_AXES)
    return Slots._make([*[one] * 8, forward.cache_specs(self.settings.config, mtp=self.settings.drafts > 0)])

  def _put(self, host):
    return jax.make_array_from_callback(host.shape, self._batch, lambda index: host[index])

  def _jit(self, function, extra, out):
    """`function(weights, slots, *extra)` on the mesh, with donated slots."""
    in_specs = specs(self.weights, self.mesh), self._slots_spec(), *extra
    mapped = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out)

    def run(weights, slots, *rest):
      with jax.default_matmul_precision(self.settings.config.precision.matmul):
        return mapped(weights, slots, *rest)

    return jax.jit(run, donate_argnums=1)


def check_request(prompts, max_tokens: int, seeds: Sequence[int], slots: int, settings: Settings) -> None:
  """Checks the arguments of `Generator.run`.

  Args:
    prompts, max_tokens, seeds: as of `Generator.run`.
    slots: sequences at a time.
    settings: the capacity of the cache, drafts, and the model's vocabulary.

  Raises:
    UserError: no prompts or more than slots; one that is empty, has a token that the model does not know, or does not
      fit the cache; no seed for each, or one that is no uint32; max_tokens below 1.
  """
  if not 0 < len(prompts) <= slots:
    raise UserError(f'{len(prompts)} prompts given; there must be 1 to {slots}, the number of slots')
  if max_tokens < 1:
    raise UserError(f'max_tokens = {max_tokens} must be at least 1')
  if len(seeds) != len(prompts):
    raise UserError(f'{len(seeds)} seeds given for {len(prompts)} prompts; there must be one for each')
  if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
    raise UserError(f'seed = {wrong[0]} must be at least 0 and below 2^32')
  for number, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(f'prompt {number} is empty; give at least one token')
    last = settings.config.model.vocab_size - 1
    if unknown := [token for token in prompt if not 0 <= token <= last]:
      raise UserError(f'prompt {number} has token {unknown[0]}; the model knows 0 to {last}')
    if len(prompt) + max_tokens > settings.capacity:
      raise UserError(
        f'prompt {number} of {len(prompt)} tokens and {max_tokens} new ones do not fit the cache of '
        f'{settings.capacity} tokens; shorten it, or raise the length of the cache'
      )


def _fetch(array: jax.Array) -> np.ndarray:
  """The whole of a sharded array on every host."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def continuation(
  params, bias_LE, tokenizer, config: Resolved, mesh, text: str, max_tokens: int, how: Sampling, seed: int, on_tokens
):
  """`text` and what a model in training makes of it, up to `max_tokens` tokens or the end of the document.

  Args:
    params, bias_LE: of the training state.
    tokenizer: of the run; its BOS begins the prompt and ends the document.
    config: with every 'auto' resolved.
    mesh: of the state.
    text: that is continued.
    max_tokens: the most to draw, at least 1.
    how: temperature and what else tokens are drawn by.
    seed: of the draws.
    on_tokens: as in `Generator.run`.
  """
  prompt = [tokenizer.bos_id, *map(int, tokenizer.encode(text.encode()))]
  settings = Settings(config, how, (tokenizer.bos_id,), len(prompt) + max_tokens, drafts=0)
  generator = Generator(prepare(params, bias_LE, config, mesh), settings, mesh, slots=1, prompt_chunk=len(prompt))
  (completion,), _ = generator.run([prompt], max_tokens, [seed % 2**32], on_tokens)
  return tokenizer.decode(prompt + completion.tokens)
