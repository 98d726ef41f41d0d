"""What the device does in generation, inside `jax.shard_map`: a prompt's chunk, a token, drafts and their check.

Slots are sequences, sharded over (`data`, `expert`); those without one, or whose sequence has ended, are masked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.inference import forward
from moe.inference.sampling import Sampling, best, distribution, draw, keys, sample
from moe.ops.norm import rms_norm
from moe.parallel.resolved import Resolved

NO_TOKEN = -1  # in place of a token that a slot did not emit
ACCEPT, DRAFT, TOKEN = range(3)  # purposes of random draws for one position


class Settings(NamedTuple):
  """What is compiled in. eos_ids: tokens that end a sequence. drafts: proposed tokens per step."""

  config: Resolved
  how: Sampling
  eos_ids: tuple[int, ...]
  capacity: int
  drafts: int


class Slots(NamedTuple):
  """Sequences under way; K = drafts + 1.

  token_B: newest token, not in the cache yet. length_B: tokens in the cache: the position of token_B. live_B: whether
  to go on. last_B: position of the last token wanted. seed_B: of its draws. hidden_BKD, next_BK, count_B: what the MTP
  module has not seen yet: normed hidden states of the main model, the tokens that followed them, and how many there
  are, up to position length_B - 1. cache: of `forward.cache_shapes`.
  """

  token_B: jax.Array
  length_B: jax.Array
  live_B: jax.Array
  last_B: jax.Array
  seed_B: jax.Array
  hidden_BKD: jax.Array
  next_BK: jax.Array
  count_B: jax.Array
  cache: tuple


class Emitted(NamedTuple):
  """token_BK: tokens of a step, NO_TOKEN where none. accepted_B: drafts that were accepted, -1 if none were checked."""

  token_BK: jax.Array
  accepted_B: jax.Array


def prefill(w: dict, slots: Slots, token_BS, count_B, ends_B, settings: Settings) -> Slots:
  """Runs a chunk of the prompts, and draws the first token of those that end in it.

  Args:
    w: from `weights.prepare`, as sharded.
    slots: this shard's sequences, before the chunk.
    token_BS: the chunk's tokens, and the one after it.
    count_B: tokens of each slot in this chunk.
    ends_B: whether its prompt ends here.
    settings: what is compiled in.
  """
  config, layers = settings.config, settings.config.model.num_layers
  S = token_BS.shape[1] - 1
  chunk = forward.chunk_at(slots.length_B, jnp.arange(S) < count_B[:, None], settings.capacity, config.model)
  h_BSD, cache = forward.run(w, slots.cache[:layers], token_BS[:, :S], chunk, config)
  h_BSD = rms_norm(h_BSD, w['scale_out_D'], config.model.norm_eps)
  hidden_BD = jnp.take_along_axis(h_BSD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
  length_B = slots.length_B + count_B
  logits_BV = forward.logits(w, hidden_BD, config.model)
  first_B, _ = sample(logits_BV, keys(slots.seed_B, length_B, TOKEN), settings.how)
  token_B = jnp.where(ends_B, first_B, slots.token_B)
  if settings.drafts:  # the last token's successor is unknown yet
    known = chunk._replace(valid_BS=jnp.arange(S) < (count_B - ends_B)[:, None])
    _, mtp_cache = forward.run_mtp(w, 0, slots.cache[layers], h_BSD, token_BS[:, 1:], known, config)
    cache = (*cache, mtp_cache)
  end_BK = (jnp.arange(settings.drafts + 1) == 0) & ends_B[:, None]
  return slots._replace(
    token_B=token_B,
    length_B=length_B,
    live_B=jnp.where(ends_B, ~_ends(token_B, settings) & (length_B < slots.last_B), slots.live_B),
    hidden_BKD=jnp.where(end_BK[..., None], hidden_BD[:, None], slots.hidden_BKD),
    next_BK=jnp.where(end_BK, token_B[:, None], slots.next_BK),
    count_B=jnp.where(ends_B, 1, slots.count_B),
    cache=cache,
  )


def decode(w: dict, slots: Slots, settings: Settings) -> tuple[Slots, Emitted]:
  """One token for every live slot."""
  config = settings.config
  chunk = forward.chunk_at(slots.length_B, slots.live_B[:, None], settings.capacity, config.model)
  h_BSD, cache = forward.run(w, slots.cache, slots.token_B[:, None], chunk, config)
  hidden_BD = rms_norm(h_BSD[:, 0], w['scale_out_D'], config.model.norm_eps)
  logits_BV = forward.logits(w, hidden_BD, config.model)
  token_B, _ = sample(logits_BV, keys(slots.seed_B, slots.length_B + 1, TOKEN), settings.how)
  slots, token_BK = _advance(slots._replace(cache=cache), token_B[:, None], jnp.zeros_like(token_B), settings)
  return slots, Emitted(token_BK, jnp.full_like(token_B, -1))


def speculate(w: dict, slots: Slots, settings: Settings) -> tuple[Slots, Emitted]:
  """The MTP module drafts, the model checks all drafts in one pass, and one token more comes for free.

  Rejection sampling (arXiv 2211.17192, algorithm 1) keeps the model's own distribution: draft d stays with probability
  min(1, p(d) / q(d)); the first that does not is replaced by a draw from max(p - q, 0). If greedy, that is: drafts stay
  as long as they are the model's own choice.
  """
  config, layers = settings.config, settings.config.model.num_layers
  draft_Bk, q_BkV, mtp_cache = _draft(w, slots, settings)
  token_BK = jnp.concatenate([slots.token_B[:, None], draft_Bk], axis=1)
  valid_BK = jnp.broadcast_to(slots.live_B[:, None], token_BK.shape)
  chunk = forward.chunk_at(slots.length_B, valid_BK, settings.capacity, config.model)
  h_BKD, cache = forward.run(w, slots.cache[:layers], token_BK, chunk, config)
  h_BKD = rms_norm(h_BKD, w['scale_out_D'], config.model.norm_eps)
  logits_BKV = forward.logits(w, h_BKD, config.model)
  if settings.how.temperature:
    p_BKV = distribution(logits_BKV, settings.how)
    accepted_B, next_BK = check_drafts(p_BKV, q_BkV, draft_Bk, slots.seed_B, slots.length_B)
  else:
    next_BK = best(logits_BKV)
    accepted_B = jnp.cumprod(draft_Bk == next_BK[:, :-1], axis=1).sum(1)
  checked_B = jnp.where(slots.live_B, accepted_B, -1)
  slots = slots._replace(cache=(*cache, mtp_cache), hidden_BKD=jnp.where(slots.live_B[:, None, None], h_BKD, 0))
  slots, token_BK = _advance(slots, next_BK, accepted_B, settings)
  return slots, Emitted(token_BK, checked_B)


def _draft(w, slots: Slots, settings: Settings):
  """Draft tokens [B, k], the distributions they were drawn from [B, k, V], and the MTP module's cache.

  First the module catches up with what the model has said; each further draft takes the hidden state of its own last.
  """
  config, cache = settings.config, slots.cache[settings.config.model.num_layers]
  hidden_BSD, next_BS, count_B = slots.hidden_BKD, slots.next_BK, slots.count_B
  first_B, drafts, probs = slots.length_B - count_B, [], []
  for i in range(settings.drafts):
    valid_BS = (jnp.arange(next_BS.shape[1]) < count_B[:, None]) & slots.live_B[:, None]
    chunk = forward.chunk_at(first_B, valid_BS, settings.capacity, config.model)
    h_BSD, cache = forward.run_mtp(w, 0, cache, hidden_BSD, next_BS, chunk, config)
    h_B1D = jnp.take_along_axis(h_BSD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    first_B, count_B = first_B + count_B, jnp.ones_like(count_B)
    hidden_BSD = rms_norm(h_B1D, w['mtp'][0]['scale_out_D'], config.model.norm_eps)
    logits_BV = forward.logits(w, hidden_BSD[:, 0], config.model)
    draft_B, probs_BV = sample(logits_BV, keys(slots.seed_B, slots.length_B + 1 + i, DRAFT), settings.how)
    drafts.append(draft_B)
    probs.append(probs_BV)
    next_BS = draft_B[:, None]
  return jnp.stack(drafts, axis=1), jnp.stack(probs, axis=1), cache


def check_drafts(p_BKV, q_BkV, draft_Bk, seed_B, length_B) -> tuple[jax.Array, jax.Array]:
  """How many drafts stay, and the tokens after that: [B] and [B, K], of which the first accepted + 1 count.

  Args:
    p_BKV: the model's distributions at the K = k + 1 positions after length_B.
    q_BkV: those that the drafts were drawn from.
    draft_Bk: tokens.
    seed_B, length_B: of the draws.
  """
  k = draft_Bk.shape[1]
  of_drafts = lambda probs: jnp.take_along_axis(probs[:, :k], draft_Bk[..., None], axis=2)[..., 0]
  uniform = lambda i: jax.vmap(jax.random.uniform)(keys(seed_B, length_B + 1 + i, ACCEPT))
  u_Bk = jnp.stack([uniform(i) for i in range(k)], axis=1)
  accept_Bk = u_Bk * of_drafts(q_BkV) < of_drafts(p_BKV)
  accepted_B = jnp.cumprod(accept_Bk, axis=1).sum(1)
  at_B = lambda a: jnp.take_along_axis(a, accepted_B[:, None, None], axis=1)[:, 0]
  p_BV, q_BV = at_B(p_BKV), at_B(jnp.pad(q_BkV, ((0, 0), (0, 1), (0, 0))))
  left_BV = jnp.maximum(p_BV - q_BV, 0)
  # Nothing is left where p and q agree up to rounding, and then the draft was as good as any.
  left_BV = jnp.where(left_BV.sum(-1, keepdims=True) > 0, left_BV, p_BV)
  last_B = draw(left_BV, keys(seed_B, length_B + 1 + accepted_B, TOKEN))
  kept_BK = jnp.pad(draft_Bk, ((0, 0), (0, 1)))
  return accepted_B, jnp.where(jnp.arange(k + 1) < accepted_B[:, None], kept_BK, last_B[:, None])


def _advance(slots: Slots, next_BK, accepted_B, settings: Settings) -> tuple[Slots, jax.Array]:
  """Slots after the first accepted + 1 of next_BK, up to the end of the sequence; and these tokens."""
  index_K = jnp.arange(next_BK.shape[1])
  ends_BK = _ends(next_BK, settings)
  ended_BK = jnp.cumsum(ends_BK, axis=1) - ends_BK > 0  # before this token
  wanted_BK = slots.length_B[:, None] + 1 + index_K <= slots.last_B[:, None]
  keep_BK = (index_K <= accepted_B[:, None]) & ~ended_BK & wanted_BK & slots.live_B[:, None]
  count_B = keep_BK.sum(1, dtype=jnp.int32)
  length_B = slots.length_B + count_B
  newest_B = jnp.take_along_axis(next_BK, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
  slots = slots._replace(
    token_B=jnp.where(slots.live_B, newest_B, slots.token_B),
    length_B=length_B,
    live_B=slots.live_B & ~_ends(newest_B, settings) & (length_B < slots.last_B),
    next_BK=next_BK,
    count_B=count_B,
  )
  return slots, jnp.where(keep_BK, next_BK, NO_TOKEN)


def _ends(token, settings: Settings) -> jax.Array:
  """Whether tokens end their sequences: bool, of their shape."""
  # With NO_TOKEN, which no token is, the array is never empty: an empty one in a shard_map kills jax 0.11.
  return (token[..., None] == jnp.array((*settings.eos_ids, NO_TOKEN), jnp.int32)).any(-1)
