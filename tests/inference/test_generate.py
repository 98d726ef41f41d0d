"""Generation with a cache against the whole model's forward pass, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import head
from jax.sharding import PartitionSpec as P

from configs import deepseek_v3
from moe.config import from_config_dict
from moe.errors import UserError
from moe.inference import forward, products, quantize, steps, weights
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings
from moe.model import transformer
from moe.ops.norm import rms_norm
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11, 12, 13], [4]]
NEW, CAPACITY = 12, 24
GREEDY = Sampling()


@pytest.fixture(scope='module')
def model(tiny_model):
  """The tiny model with 8 heads, widths that 8 shards divide, a dense and a MoE layer, and one MTP module."""
  return dataclasses.replace(tiny_model, num_layers=2, num_heads=8, d_ff=16, d_expert=8, mtp_depth=1)


def resolved(model):
  return Resolved(model=model, dispatch='local', grouped_matmul='blocked', dropless=True)


def random_parameters(config):
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    value = 0.3 * rng.normal(size=leaf.shape)
    return (1 + value if path[-1].key.startswith('scale') else value).astype(np.float32)

  params = jax.tree.map_with_path(draw, transformer.abstract_params(config))
  return params, (rng.normal(size=(config.model.num_routers, config.model.num_experts)) / 5).astype(np.float32)


@pytest.fixture(scope='module')
def full_logits(mesh_of):
  """full_logits(config, tokens, scheme): float32 [S, V] of the main model, and of the MTP module if there is one, from
  parameters rounded to `scheme`."""

  def run(config, params, bias_LE, token_BS):
    built, ones = transformer.build(config, params, bias_LE), jnp.ones_like(token_BS)
    x_BSD = transformer.embed(built, token_BS, ones, config)
    h_BSD, _ = transformer.stack(built, x_BSD, ones, ones > 0, config)
    found = [head(built, h_BSD, built.scale_out_D[...])]
    if config.model.mtp_depth:
      next_BS = jnp.roll(token_BS, -1, axis=1)
      h_BSD, _ = transformer.mtp_hidden(built, 0, h_BSD, next_BS, ones, ones > 0, config)
      found.append(head(built, h_BSD, built.mtp[0].scale_out_D[...]))
    return found

  compiled = {}

  def full_logits(config, tokens, scheme='none'):
    if config not in compiled:
      inside = lambda params, bias_LE, token_BS: run(config, params, bias_LE, token_BS)
      specs = (P(), P(), P(BATCH_AXES))
      compiled[config] = jax.jit(
        jax.shard_map(inside, mesh=mesh_of(), in_specs=specs, out_specs=P(BATCH_AXES, None, 'tensor'))
      )
    token_BS = np.zeros((1, CAPACITY), np.int32)
    token_BS[0, : len(tokens)] = tokens
    params, bias_LE = random_parameters(config)
    found = compiled[config](quantize.rounded(params, scheme), bias_LE, token_BS)
    return [np.asarray(logits_BSV)[0, : len(tokens), : config.model.vocab_size] for logits_BSV in found]

  return full_logits


@pytest.fixture(scope='module')
def generator(mesh_of):
  """generator(config, mesh sizes, drafts, how, eos_ids, scheme): with three slots, prompts in chunks of 4."""

  def generator(config, sizes=(), drafts=0, how=GREEDY, eos_ids=(), scheme='none'):
    mesh = mesh_of(**dict(sizes))
    dispatch = 'local' if mesh.shape['expert'] == 1 else 'all_gather'
    config = dataclasses.replace(config, dispatch=dispatch)
    ready = weights.prepare(*random_parameters(config), config, mesh, scheme)
    settings = Settings(config, how, eos_ids, CAPACITY, drafts)
    return Generator(ready, settings, mesh, slots=3, prompt_chunk=4, steps_per_call=5)

  return generator


def tokens_of(generator, prompts=PROMPTS, seeds=(1, 2, 3)):
  completions, _ = generator.run(prompts, NEW, seeds)
  assert all(completion.finish == 'length' for completion in completions)
  return [completion.tokens for completion in completions]


def greedy_by_full_passes(full_logits, config, prompt):
  tokens = list(prompt)
  for _ in range(NEW):
    tokens.append(int(full_logits(config, tokens)[0][-1].argmax()))
  return tokens[len(prompt) :]


def cached_logits(config, mesh, tokens, chunks, scheme='none'):
  """float32 [S, V] of one sequence, run in chunks of these sizes, with the cache in between."""
  ready = weights.prepare(*random_parameters(config), config, mesh, scheme)
  specs = weights.specs(ready, mesh), forward.cache_specs(config, mtp=False)

  def run(w, cache, token_BS, length_B):
    chunk = forward.chunk_at(length_B, jnp.ones(token_BS.shape, bool), CAPACITY, config.model)
    h_BSD, cache = forward.run(w, cache, token_BS, chunk, config)
    normed_BSD = rms_norm(h_BSD, w['scale_out_D'], config.model.norm_eps)
    return forward.logits(w, normed_BSD, config.model), cache

  mapped = jax.jit(
    jax.shard_map(run, mesh=mesh, in_specs=(*specs, P(BATCH_AXES), P(BATCH_AXES)), out_specs=(P(BATCH_AXES), specs[1]))
  )
  cache = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), forward.cache_shapes(config, 1, CAPACITY, False))
  found, done = [], 0
  for size in chunks:
    token_BS = np.array([tokens[done : done + size]], np.int32)
    logits_BSV, cache = mapped(ready, cache, token_BS, np.array([done], np.int32))
    found.append(np.asarray(logits_BSV)[0, :, : config.model.vocab_size])
    done += size
  return np.concatenate(found)


VARIANTS = {
  'mla': {},
  'no_query_latent_no_groups': {'q_lora_rank': 0, 'num_groups': 1, 'top_groups': 1, 'yarn_factor': 1.0},
  'mha': {'attention': 'mha', 'q_lora_rank': 0, 'qk_nope_dim': 0},
  'tied_no_shared': {'tie_embeddings': True, 'num_shared_experts': 0, 'num_dense_layers': 0, 'mtp_depth': 0},
  # Of chunks of one token; with another eps than the latents', so large that it matters which a norm has.
  'an_expert_for_each_row': {'num_experts': 16, 'norm_eps': 0.1},
  'and_no_shared': {'num_experts': 16, 'num_shared_experts': 0},
  'and_two_shared': {'num_experts': 16, 'num_shared_experts': 2},  # unlike the others
}
SHARDED = [(variant, (('tensor', 2),)) for variant in ('mla', 'an_expert_for_each_row')]


@pytest.mark.parametrize(('variant', 'sizes'), [*((variant, ()) for variant in VARIANTS), *SHARDED])
def test_chunks_with_a_cache_give_the_full_forward_pass(variant, sizes, model, full_logits, mesh_of):
  config = resolved(dataclasses.replace(model, **VARIANTS[variant]))
  tokens = np.random.default_rng(3).integers(0, model.vocab_size, 16).tolist()
  want = full_logits(config, tokens)[0]
  for chunks in ([16], [7, 1, 1, 7]):
    got = cached_logits(config, mesh_of(**dict(sizes)), tokens, chunks)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


# Each shard of two begins where a block of 128 does, and so do matrices that are joined: the same scales everywhere.
WIDE = {
  'num_heads': 4, 'd_model': 32, 'd_ff': 256, 'd_expert': 256,
  'q_lora_rank': 0, 'kv_lora_rank': 48, 'qk_nope_dim': 48, 'qk_rope_dim': 16, 'v_dim': 64,
}  # fmt: skip
WIDE_MHA = WIDE | {'attention': 'mha', 'qk_nope_dim': 0, 'qk_rope_dim': 32, 'v_dim': 32}


@pytest.mark.parametrize(('sizes', 'changes', 'scheme'), [((('tensor', 2),), {}, 'none'), ((), WIDE_MHA, 'mxfp4')])
def test_chunks_of_many_rows(sizes, changes, scheme, model, full_logits, mesh_of, monkeypatch):
  """They are multiplied by other kernels, with dequantised weights."""
  monkeypatch.setattr(forward, 'FEW', 0)
  monkeypatch.setattr(products, 'FEW_DENSE', 0)
  config = resolved(dataclasses.replace(model, **changes))
  tokens = np.random.default_rng(3).integers(0, model.vocab_size, 16).tolist()
  want = full_logits(config, tokens, scheme)[0]
  got = cached_logits(config, mesh_of(**dict(sizes)), tokens, [16], scheme)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * np.abs(want).max())


def test_quantised_weights_give_the_tokens_of_rounded_ones(model, full_logits, generator):
  config = resolved(dataclasses.replace(model, **WIDE_MHA))
  want = [greedy_by_full_passes(functools.partial(full_logits, scheme='mxfp4'), config, prompt) for prompt in PROMPTS]
  assert tokens_of(generator(config, scheme='mxfp4')) == want
  assert greedy_by_full_passes(full_logits, config, PROMPTS[1]) != want[1]


@pytest.mark.parametrize(('scheme', 'axes'), [('fp8', ['tensor']), ('mxfp4', ['tensor', 'expert'])])
def test_quantised_weights_on_every_mesh(scheme, axes, model, generator):
  config = resolved(dataclasses.replace(model, mtp_depth=0, **WIDE))
  want = tokens_of(generator(config, scheme=scheme))
  for axis in axes:
    assert tokens_of(generator(config, ((axis, 2),), scheme=scheme)) == want


@pytest.fixture(scope='module')
def greedy(model, full_logits):
  return [greedy_by_full_passes(full_logits, resolved(model), prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
  ('sizes', 'drafts'),
  [
    ((), 0),
    ((), 1),
    ((), 3),
    ((('tensor', 8),), 0),
    ((('expert', 8),), 2),
    ((('data', 2), ('expert', 2), ('tensor', 4)), 1),
  ],
)
def test_greedy_tokens_on_every_mesh(sizes, drafts, model, greedy, generator):
  """Token for token those of full forward passes: plain and speculative, on one device and on meshes."""
  assert tokens_of(generator(resolved(model), sizes, drafts)) == greedy


def test_plain_attention_on_a_mesh(model, full_logits, generator):
  config = resolved(dataclasses.replace(model, **VARIANTS['mha']))
  want = [greedy_by_full_passes(full_logits, config, prompt) for prompt in PROMPTS]
  assert tokens_of(generator(config, (('tensor', 8),), drafts=2)) == want


def test_drafts_are_those_of_the_mtp_module(model, greedy, full_logits, generator):
  """The drafts that are accepted are those that full passes of the MTP module would make."""
  made = generator(resolved(model), drafts=1)
  _, stats = made.run(PROMPTS[:1], NEW, [1])
  tokens = PROMPTS[0] + greedy[0]
  place, checked, accepted = len(PROMPTS[0]), 0, 0
  mtp_SV = full_logits(resolved(model), tokens)[1]
  while place < len(tokens) - 1:
    right = mtp_SV[place - 1].argmax() == tokens[place + 1]
    checked, accepted, place = checked + 1, accepted + right, place + 1 + right
  assert stats.checked == checked
  assert stats.accepted_k == [accepted]


def test_sampling_depends_on_the_seed_alone(model, generator):
  """Not on slot, batch, chunks or mesh; and speculation has a seed of its own."""
  how = Sampling(0.9, 20, 0.95)
  plain = generator(resolved(model), how=how)
  want = tokens_of(plain)
  assert tokens_of(generator(resolved(model), (('expert', 8),), how=how)) == want
  assert tokens_of(plain, PROMPTS[1:2], [2]) == want[1:2]
  assert tokens_of(plain, PROMPTS[1:2], [7]) != want[1:2]
  speculative = generator(resolved(model), drafts=2, how=how)
  assert tokens_of(speculative) == tokens_of(speculative)


def test_sequences_end(model, greedy, generator):
  """At a token that ends, which is not part of them, at max_tokens, and when the caller says so."""
  eos_ids = greedy[1][4], greedy[0][6]
  ends = [[i for i, token in enumerate(tokens) if token in eos_ids] for tokens in greedy]
  until = [tokens[: at[0]] if at else tokens for tokens, at in zip(greedy, ends, strict=True)]
  for drafts in (0, 2):
    completions, _ = generator(resolved(model), drafts=drafts, eos_ids=eos_ids).run(PROMPTS, NEW, [0] * 3)
    assert [completion.tokens for completion in completions] == until
    assert [completion.finish == 'end' for completion in completions] == [bool(at) for at in ends]
  made, seen = generator(resolved(model)), [[], [], []]

  def stop(row, tokens):
    seen[row] += tokens
    return row == 0 and len(seen[0]) > 2

  completions, _ = made.run(PROMPTS, NEW, [0] * 3, stop)
  assert [completion.tokens for completion in completions] == seen
  assert [completion.finish for completion in completions] == ['stopped', 'length', 'length']
  assert seen[1:] == greedy[1:]
  one, stats = made.run(PROMPTS, 1, [0] * 3)
  assert [completion.tokens for completion in one] == [tokens[:1] for tokens in greedy]
  assert stats.device_steps == 0


def test_cache_of_deepseek_v3():
  """61 layers of 512 + 64 numbers in bf16: 70,272 bytes per token."""
  config = from_config_dict(deepseek_v3.get_config())
  config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, compute='bfloat16'))
  shapes = forward.cache_shapes(config, slots=3, capacity=5, mtp=False)
  assert sum(one.size * one.dtype.itemsize for one in jax.tree.leaves(shapes)) == 3 * 5 * 70_272


@pytest.mark.parametrize(
  ('prompts', 'new', 'says'),
  [
    ([], 1, '0 prompts given; there must be 1 to 3'),
    ([[1]] * 4, 1, '4 prompts given'),
    ([[1], []], 1, 'prompt 1 is empty'),
    ([[1, 40]], 1, 'prompt 0 has token 40; the model knows 0 to 39'),
    ([[1] * 20], 5, 'prompt 0 of 20 tokens and 5 new ones do not fit the cache of 24'),
    ([[1]], 0, 'max_tokens = 0 must be at least 1'),
    ([[3, -2]], 1, 'prompt 0 has token -2'),
  ],
)
def test_bad_requests(prompts, new, says, model, generator):
  with pytest.raises(UserError, match=says):
    generator(resolved(model)).run(prompts, new, [0] * len(prompts))


@pytest.mark.parametrize(('seeds', 'says'), [([-1], 'seed = -1'), ([2**32], 'seed = 4294967296'), ([1, 2], '2 seeds')])
def test_bad_seeds(seeds, says, model, generator):
  with pytest.raises(UserError, match=says):
    generator(resolved(model)).run([[1]], 1, seeds)


def test_drafts_need_an_mtp_module(model, generator):
  with pytest.raises(UserError, match='needs a model with an MTP module'):
    generator(resolved(dataclasses.replace(model, mtp_depth=0)), drafts=1)


def test_tokens_nobody_sent_are_not_emitted(model, generator):
  """Slots without a sequence say nothing, and nothing of theirs is cached."""
  made = generator(resolved(model), (('expert', 8),))
  assert made.slots == 8
  chunks = made._chunks(PROMPTS)
  slots = made._empty(PROMPTS, NEW, [0] * 3)
  made._compile(slots, chunks[0])
  for chunk in chunks:
    slots = made._prefill(made.weights, slots, *chunk)
  slots, emitted = made._decode(made.weights, slots)
  assert (np.asarray(emitted.token_BK)[:, 3:] == steps.NO_TOKEN).all()
  assert (np.asarray(emitted.accepted_B) == -1).all()
  assert all((np.asarray(one)[3:] == 0).all() for one in jax.tree.leaves(slots.cache))
