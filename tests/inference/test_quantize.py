"""Quantised parameters of whole models, and the sizes of DeepSeek-V3 against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_configs import load

from moe.errors import UserError
from moe.inference import quantize
from moe.model import transformer
from moe.ops import weights
from moe.ops.weights import Fp8Weight, Mxfp4Weight
from moe.parallel import mesh
from moe.parallel.sharding import place

GB = 1e9
H20_BYTES = 96 * GB


@pytest.fixture(scope='module')
def tiny():
  """A config with latent queries, its parameters, and each by its path."""
  config = load('tiny')
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, q_lora_rank=48, vocab_size=40))
  params = transformer.init_params(config, jax.random.key(0))
  return config, params, dict(jax.tree.leaves_with_path(params))


def v3():
  """DeepSeek-V3 without its MTP module."""
  config = load('deepseek_v3')
  return dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_depth=0))


def by_path(stored):
  return jax.tree.leaves_with_path(stored, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight | Mxfp4Weight))


@pytest.mark.parametrize('scheme', ['fp8', 'mxfp4'])
def test_quantised_leaves_dequantise_to_the_parameters(tiny, scheme):
  _, params, original = tiny
  kinds = {}
  for path, leaf in by_path(quantize.quantize_params(params, scheme)):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    kinds[name] = type(leaf)
    if isinstance(leaf, jax.Array):
      np.testing.assert_array_equal(leaf, original[path])
      continue
    values = np.asarray(weights.dequantize(leaf, jnp.float32)).reshape(original[path].shape)
    difference = np.abs(values - original[path])
    # E4M3's spacing below a block's largest value is 32 of 448, E2M1's 2 of 6, and what is above 6 becomes 6 of 8.
    bound = 16 / 448 if isinstance(leaf, Fp8Weight) else 1 / 4
    assert difference.max() <= 1.001 * bound * np.abs(original[path]).max()
  experts = Fp8Weight if scheme == 'fp8' else Mxfp4Weight
  assert {kinds[f'{at}/experts/{w}'] for at in ('layers', 'mtp/0/layer') for w in ('w_up_eDF', 'w_down_eFD')} == {
    experts
  }
  blocks = (
    'layers/shared/w_up_DF',
    'dense_layers/0/ffn/w_down_FD',
    'layers/attention/w_out_HUD',
    'layers/attention/w_kv_down_DC',
  )
  assert {kinds[name] for name in blocks} == {Fp8Weight}
  kept = {name.rsplit('/', 1)[-1] for name, kind in kinds.items() if kind not in (Fp8Weight, Mxfp4Weight)}
  assert {name for name in kept if name.startswith('w_')} == {
    'w_embedding_VD', 'w_head_DV', 'w_router_DE', 'w_hidden_DD', 'w_embedding_DD', 'w_key_CHN', 'w_value_CHU',
  }  # fmt: skip


def test_a_product_with_a_quantised_head_projection_is_that_of_the_forward_pass(tiny):
  """K is what the forward pass sums over: rows [H * U] for w_out_HUD, the queries' latents for w_query_AHN."""
  _, params, _ = tiny
  stored = quantize.quantize_params(params, 'fp8')
  for name, spec, shape in (
    ('w_out_HUD', 'thu,lhud->ltd', (5, 4, 32)),
    ('w_query_AHN', 'ta,lahn->lthn', (5, params['layers']['attention']['w_query_AHN'].shape[1])),
  ):
    w, quantised = params['layers']['attention'][name], stored['layers']['attention'][name]
    x = jax.random.normal(jax.random.key(1), shape)
    assert weights.shape_of(quantised) == quantize.matrix_shape(name, w.shape)
    expected = np.einsum(spec, x, w).reshape(2, 5, -1)
    y = np.asarray(x.reshape(5, -1) @ weights.dequantize(quantised, jnp.float32))
    assert np.linalg.norm(y - expected) < 0.05 * np.linalg.norm(expected)


def test_scheme_none_keeps_and_casts_as_the_policy_says(tiny):
  _, params, _ = tiny
  assert all(
    a is b
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(quantize.quantize_params(params, 'none')), strict=True)
  )
  layers = [params['layers'] | {'bias_E': jnp.ones(4)}]  # as generation has them, a dict per layer
  stored = quantize.quantize_params({**params, 'layers': layers}, 'none', jnp.bfloat16)
  stored = stored | {'layers': stored['layers'][0]}
  assert stored['layers']['bias_E'].dtype == jnp.float32
  assert stored['layers']['experts']['w_up_eDF'].dtype == stored['w_head_DV'].dtype == jnp.bfloat16
  assert stored['layers']['w_router_DE'].dtype == stored['scale_out_D'].dtype == jnp.float32


@pytest.mark.parametrize(
  ('module', 'name', 'halved', 'spec'),
  [
    ('attention', 'w_out_HUD', 1, P(None, 'tensor', None)),
    ('attention', 'w_query_AHN', 2, P(None, None, 'tensor')),
    ('shared', 'w_down_FD', 1, P(None, 'tensor', None)),
    ('experts', 'w_down_eFD', 2, P(None, 'expert', 'tensor', None)),
    ('experts', 'w_up_eDF', 3, P(None, 'expert', None, 'tensor')),
  ],
)
def test_each_shard_quantises_its_own_part(tiny, module, name, halved, spec):
  """Inside shard_map, laid out as `matrix_spec` says: every shard's blocks begin where its part begins."""
  w, shape = tiny[1]['layers'][module][name], (1, 1, 2, 2)
  devices = jax.make_mesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:4])
  assert quantize.matrix_spec(name, len(spec)) == spec
  quantised = jax.jit(
    jax.shard_map(
      lambda w: quantize.quantize_params({module: {name: w}}, 'mxfp4')[module][name],
      mesh=devices,
      in_specs=place(name, w.shape, dict(devices.shape)).compute,
      out_specs=spec,
    )
  )(w)
  halves = np.split(np.asarray(w), 2, halved)
  halves = [quantize.quantize_params({module: {name: jnp.asarray(half)}}, 'mxfp4')[module][name] for half in halves]
  for ours, *parts in zip(quantised, *halves, strict=True):
    expected = np.concatenate([np.asarray(part, np.float32) for part in parts], spec.index('tensor'))
    np.testing.assert_array_equal(np.asarray(ours, np.float32), expected)
  assert type(quantised) is (Mxfp4Weight if module == 'experts' else Fp8Weight)


@pytest.mark.parametrize('scheme', quantize.SCHEMES)
def test_storage_is_what_the_arrays_take(tiny, scheme):
  config, params, _ = tiny
  stored = quantize.quantize_params(params, scheme, jnp.bfloat16)
  assert quantize.storage_bytes(config, scheme)['total'] == sum(leaf.nbytes for leaf in jax.tree.leaves(stored))


def test_mistakes_are_named():
  config = load('tiny')
  narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, d_expert=48))
  with pytest.raises(UserError, match=r'layers\.experts\.w_down_eFD: MXFP4 needs a multiple of 32 values .* not 48'):
    quantize.storage_bytes(narrow, 'mxfp4')
  assert quantize.storage_bytes(narrow, 'fp8')['total'] > 0
  with pytest.raises(UserError, match="'int8' must be one of none, fp8, mxfp4"):
    quantize.quantize_params({'w_head_DV': jnp.zeros((2, 2))}, 'int8')
  with pytest.raises(UserError, match=r"'none' take 1342\.3 GB per device on expert 1 x tensor 1"):
    quantize.serving_memory(v3(), 'none', H20_BYTES)


ROUTED = 58 * 256 * 3 * 7168 * 2048
ATTENTION = 61 * (7168 * (1536 + 512 + 64) + 1536 * 128 * 192 + 128 * 128 * 7168)
ABSORBED = 61 * 512 * 128 * 256
FEED_FORWARD = 3 * 3 * 7168 * 18432 + 58 * 3 * 7168 * 2048
EMBEDDING_AND_HEAD = 2 * 129280 * 7168
ROUTER_AND_NORMS = 58 * 7168 * 256 + 61 * (2 * 7168 + 1536 + 512) + 7168
# The rotary key's matrix is 64 wide, and so fills half of its blocks' width.
SCALES = 4 * (ATTENTION + FEED_FORWARD + 61 * 7168 * 64) // 128**2


@pytest.mark.parametrize(
  ('scheme', 'expected'),
  [
    ('none', 2 * (ROUTED + ATTENTION + FEED_FORWARD)),
    ('fp8', ROUTED + 4 * ROUTED // 128**2 + ATTENTION + FEED_FORWARD + SCALES),
    ('mxfp4', ROUTED // 2 + ROUTED // 32 + ATTENTION + FEED_FORWARD + SCALES),
  ],
)
def test_bytes_of_deepseek_v3(scheme, expected):
  held = quantize.storage_bytes(v3(), scheme)
  assert held['total'] == expected + 2 * (EMBEDDING_AND_HEAD + ABSORBED) + 4 * ROUTER_AND_NORMS
  assert held['total'] == sum(size for group, size in held.items() if group != 'total')
  published = {'none': (1342, 1343), 'fp8': (672, 675), 'mxfp4': (366, 436)}[scheme]  # GB: bfloat16 is 2 x 671.03e9
  assert published[0] < held['total'] / GB < published[1]


def test_the_cache_of_deepseek_v3_on_16_gpus_of_96_gb():
  config = v3()
  assert quantize.cache_bytes_per_token(config) == 61 * (512 + 64) * 2 == 70272
  total = quantize.storage_bytes(config, 'mxfp4')
  for expert, tensor in ((16, 1), (2, 8), (1, 16)):
    memory = quantize.serving_memory(config, 'mxfp4', H20_BYTES, expert=expert, tensor=tensor)
    assert memory.weights_bytes + memory.cache_bytes == H20_BYTES
    assert memory.cache_tokens == expert * (memory.cache_bytes // 70272)
  # Experts alone are divided over 16, and all else is on every GPU: more is left in all when tensor is 1.
  whole = quantize.serving_memory(config, 'mxfp4', H20_BYTES, expert=16)
  assert whole.replicated_bytes == total['total'] - total['routed experts']
  assert whole.weights_bytes == whole.replicated_bytes + total['routed experts'] // 16
  twice = quantize.serving_memory(config, 'mxfp4', H20_BYTES, data=2, expert=16)
  assert (twice.weights_bytes, twice.cache_tokens) == (whole.weights_bytes, 2 * whole.cache_tokens)


def test_plain_attention_caches_keys_and_values_of_each_shards_heads():
  config = load('loss_free_1b')
  model = config.model
  width = model.num_heads * (model.qk_rope_dim + model.v_dim)
  assert quantize.cache_bytes_per_token(config, 'float32') == 4 * model.num_layers * width
  one = quantize.serving_memory(config, 'none', 10 * GB, tensor=2)
  assert one.cache_tokens == one.cache_bytes // (model.num_layers * width)
