"""The routing of few tokens on GPUs: all decisions of a token in one program of one Pallas kernel, compiled by Triton.

Experts lie in the kernel as [groups, experts of a group], and the best of what is left is taken again and again: by its
value, and among equals by the lowest number, as `lax.top_k` does.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe.config import ModelConfig
from moe.ops.triton_call import call, span

WARPS = 4


def choose(logits_PTE, bias_E, mask_T, config: ModelConfig, multiplicative: bool, shared: bool, interpret=False):
  """(expert_TK, weight_TK); see `moe.model.router.choose`.

  Args:
    logits_PTE, bias_E, mask_T, config, multiplicative, shared: as of `moe.model.router.choose`.
    interpret: run by jnp instead, on any platform.
  """
  (P, T, _), G = logits_PTE.shape, config.num_groups
  operands = logits_PTE.reshape(P, T, G, -1), bias_E.reshape(G, -1), mask_T.astype(jnp.int32)
  anywhere, K = pl.BlockSpec(memory_space=pl.ANY), config.top_k + shared
  kernel = functools.partial(_kernel, config=config, multiplicative=multiplicative, shared=shared)
  outs = [((T, K), jnp.int32, anywhere), ((T, K), jnp.float32, anywhere)]
  return tuple(call(kernel, (T,), operands, [anywhere] * 3, outs, WARPS, 1, interpret))


def _kernel(logits, bias, mask, expert, weight, config: ModelConfig, multiplicative: bool, shared: bool):
  t, (parts, _, G, size), E = pl.program_id(0), logits.shape, config.num_experts
  (all_P, inside_P), (all_G, inside_G), (columns, inside_C) = (span(t * 0, length) for length in (parts, G, size))
  group, column, inside = jnp.arange(len(inside_G)), jnp.arange(len(inside_C)), inside_G[:, None] & inside_C
  logit = plt.load(logits.at[all_P, t, all_G, columns], mask=inside_P[:, None, None] & inside[None], other=0).sum(0)
  score = _scores(logit, inside, config)
  offset = plt.load(bias.at[all_G, columns], mask=inside, other=0)
  biased = jnp.where(inside, score * offset if multiplicative else score + offset, -jnp.inf)
  number = jnp.where(inside, group[:, None] * size + column, -1)
  if G > 1:
    first = _lowest(biased == biased.max(1, keepdims=True), number, E, axis=1)
    second = jnp.where(number == first[:, None], -jnp.inf, biased).max(1)
    opened = _best(biased.max(1) + second, group, inside_G, config.top_groups, G)[1]
    biased = jnp.where(opened[:, None], biased, -jnp.inf)  # not 0, see `moe.model.router.select`
  found, _ = _best(biased, number, inside, config.top_k, E)
  slots, wanted = span(t * 0, config.top_k + shared)
  slot = jnp.arange(len(wanted))
  experts, weights = jnp.full(slot.shape, E, jnp.int32), jnp.zeros(slot.shape)
  for k, index in enumerate(found):
    experts = jnp.where(slot == k, index, experts)
    weights = jnp.where(slot == k, jnp.where(number == index, score, 0).sum(), weights)
  if config.normalize_gates:
    weights /= weights.sum() + 1e-20
  weights *= config.route_scale
  if shared:
    weights = jnp.where(slot == config.top_k, 1, weights)
  experts = jnp.where(mask[t] != 0, experts, E + shared)
  plt.store(expert.at[t, slots], experts, mask=wanted)
  plt.store(weight.at[t, slots], weights, mask=wanted)


def _scores(logit, inside, config):
  if config.score_fn == 'sigmoid':
    return jax.nn.sigmoid(logit)
  logit = jnp.where(inside, logit, -jnp.inf)
  power = jnp.exp(logit - logit.max())
  return power / power.sum()


def _best(value, number, inside, count: int, numbers: int):
  """The numbers, of so many, of the `count` largest values inside, largest first, and where these are."""
  left, found = inside, []
  for _ in range(count):
    largest = jnp.where(left, value, -jnp.inf).max()
    found.append(_lowest(left & (value == largest), number, numbers))
    left &= number != found[-1]
  return found, inside & ~left


def _lowest(where, number, numbers: int, axis=None):
  """The lowest number there; of NaNs, which equal nothing, the last one: an expert that there is."""
  return jnp.where(where, number, numbers - 1).min(axis)
