"""Weights of the whole model in few bytes, and what they and the cache take of a cluster's memory.

    scheme   routed experts   shared experts, dense feed-forwards, attention's projections*  the rest
    none     as they are      as they are                                                    as it is
    fp8      FP8 blocks       FP8 blocks                                                     as it is
    mxfp4    MXFP4            FP8 blocks                                                     as it is

* but for the two that decoding absorbs (`moe.inference.forward`).

The rest is what DeepSeek's released FP8 weights leave alone, too: embedding, head, router, norms and the projections of
MTP modules (arXiv 2412.19437, section 3.3.1). A quantised leaf is a `moe.ops.weights` weight of matrices [..., K, N]
whose K is all axes that the forward pass sums over, and N all others:

    w_up_eDF, w_gate_DF, w_kv_down_DC ...          as they are
    w_query_AHN, w_query_DHN, w_key_DHR ...        [first axis, heads x width]
    w_out_HUD                                      [heads x width, D]
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe.config import Config
from moe.errors import UserError
from moe.model.parameters import is_float32
from moe.model.transformer import abstract_params
from moe.ops import weights
from moe.parallel.sharding import LEGEND, axes_over, place
from moe.registry import ATTENTIONS

SCHEMES = ('none', 'fp8', 'mxfp4')
EXPERTS, ROUTER_AND_NORMS = 'routed experts', 'router and norms'
# Group of the parameters in a module of this name.
MODULES = {'experts': EXPERTS, 'shared': 'shared experts', 'ffn': 'dense feed-forwards', 'attention': 'attention'}


def quantize_params(params: dict, scheme: str, dtype=None) -> dict:
  """The same tree with some leaves quantised.

  Args:
    params: nested dict of parameters, as of `moe.model.transformer.init_params`.
    scheme: of SCHEMES.
    dtype: what the others are cast to, but for the router and the norms' scales; None casts nothing.

  Raises:
    UserError: unknown scheme, or a width that MXFP4 cannot have.
  """
  one = functools.partial(_stored, scheme=scheme, dtype=dtype)
  return jax.tree.map_with_path(
    lambda path, leaf: leaf if is_quantized(leaf) else one(path, leaf), params, is_leaf=is_quantized
  )


def is_quantized(leaf) -> bool:
  """Whether a leaf of a tree of parameters is quantised."""
  return isinstance(leaf, weights.Fp8Weight | weights.Mxfp4Weight)


def rounded(params: dict, scheme: str) -> dict:
  """The same parameters, as arrays of the same shapes, after rounding to `scheme`: to measure what it costs.

  Generation rounds each shard's part, and attention's matrices joined: there, other values share an FP8 scale.
  """
  stored = quantize_params(params, scheme)
  back = lambda old, new: weights.dequantize(new, old.dtype).reshape(old.shape) if is_quantized(new) else new
  return jax.tree.map(back, params, stored, is_leaf=is_quantized)


def _stored(path, leaf, scheme, dtype):
  name, kind = path[-1].key, _kind(path, scheme)
  if kind is None:
    return leaf if dtype is None or group_of(path) == ROUTER_AND_NORMS else leaf.astype(dtype)
  matrices = leaf.reshape(matrix_shape(name, leaf.shape))
  if kind == 'mxfp4' and matrices.shape[-2] % weights.GROUP:
    raise UserError(
      f'{jax.tree_util.keystr(path, simple=True, separator=".")}: MXFP4 needs a multiple of {weights.GROUP} values '
      f"to sum over, not {matrices.shape[-2]}; use the scheme 'fp8'"
    )
  return _quantize(matrices, kind)


_quantize = jax.jit(weights.quantize, static_argnames='kind')


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """[..., K, N] of a parameter of this name and shape; layers and experts stay in front."""
  _, summed, others = _axes(name)
  lead = len(shape) - len(summed) - len(others)
  split = lead + len(summed)
  return *shape[:lead], math.prod(shape[lead:split]), math.prod(shape[split:])


def matrix_spec(name: str, ndim: int) -> P:
  """How all arrays of a quantised parameter are divided over a mesh, if each shard quantises its own part.

  Heads come first in what is flattened, so a shard's heads stay together.

  Args:
    name: of the parameter.
    ndim: axes of the quantised weight's arrays.
  """
  lead, summed, others = _axes(name)
  layers = [None] * (ndim - 2 - len(lead))
  return P(*layers, *(LEGEND[letter] for letter in (*lead, summed[0], others[0])))


def _axes(name):
  """The letters of a name that stand for experts, for axes that are summed over and for the others."""
  suffix = name.rsplit('_', 1)[-1]
  lead = 'e' if suffix[0] == 'e' else ''
  rest = suffix[len(lead) :]
  cut = 2 if rest.startswith('HU') else 1
  return lead, rest[:cut], rest[cut:]


def group_of(path) -> str:
  """The group of a parameter, by its path in the tree."""
  name, module = path[-1].key, getattr(path[-2], 'key', None) if len(path) > 1 else None
  if is_float32(name) or name.startswith('bias'):
    return ROUTER_AND_NORMS
  if module in MODULES:
    return MODULES[module]
  return 'MTP projections' if path[0].key == 'mtp' else 'embedding and head'


def _kind(path, scheme):
  """What a parameter is quantised to, or None."""
  if scheme not in SCHEMES:
    raise UserError(f'quantisation scheme {scheme!r} must be one of {", ".join(SCHEMES)}')
  group = group_of(path)
  as_it_is = any(path[-1].key in kind.not_quantized for kind in ATTENTIONS.values())
  if scheme == 'none' or group not in MODULES.values() or as_it_is:
    return None
  return scheme if group == EXPERTS else 'fp8'


def storage_bytes(config: Config, scheme: str, expert: int = 1, tensor: int = 1) -> dict[str, int]:
  """Bytes of the weights on one device, scales included, by group and as 'total'; nothing is allocated.

  What is not quantised is bfloat16, router and norms float32.

  Args:
    config: the model; its MTP modules are counted.
    scheme: of SCHEMES.
    expert, tensor: sizes of the mesh axes that weights are divided over. 1 and 1: all of the model.

  Raises:
    UserError: as `quantize_params`, or a dimension does not divide by its mesh axis.
  """
  totals: dict[str, int] = {}
  for path, _, leaf_bytes in _leaves(config, scheme, expert, tensor):
    totals[group_of(path)] = totals.get(group_of(path), 0) + leaf_bytes
  return totals | {'total': sum(totals.values())}


def _leaves(config, scheme, expert, tensor):
  """(path, whether other devices hold the same part, bytes on one device) of each parameter."""
  sizes = {'pipe': 1, 'data': 1, 'expert': expert, 'tensor': tensor}
  for path, leaf in jax.tree.leaves_with_path(abstract_params(config)):
    layout = place(path[-1].key, leaf.shape, sizes).compute
    shape = tuple(size // sizes.get(axis, 1) for size, axis in zip(leaf.shape, layout, strict=True))
    one = functools.partial(_stored, path, scheme=scheme, dtype=jnp.bfloat16)
    parts = jax.tree.leaves(jax.eval_shape(one, jax.ShapeDtypeStruct(shape, leaf.dtype)))
    copied = math.prod(sizes[axis] for axis in layout if axis) < expert * tensor
    yield path, copied, sum(part.size * part.dtype.itemsize for part in parts)


def cache_bytes_per_token(config: Config, dtype='bfloat16', tensor: int = 1) -> int:
  """Bytes that a cached token takes in all layers, on one of so many shards of `tensor`, which divide heads."""
  arrays = ATTENTIONS[config.model.attention].cache(config.model)
  widths = (math.prod(shape) // (tensor if 'tensor' in axes_over(name) else 1) for name, shape in arrays.items())
  return config.model.num_layers * sum(widths) * jnp.dtype(dtype).itemsize


class ServingMemory(NamedTuple):
  """Bytes of one device: of weights, of those that other devices of the same `data` hold too, and left for the cache.

  cache_tokens: what the caches of all devices hold together.
  """

  weights_bytes: int
  replicated_bytes: int
  cache_bytes: int
  cache_tokens: int


def serving_memory(
  config: Config, scheme: str, device_bytes: float, data: int = 1, expert: int = 1, tensor: int = 1, dtype='bfloat16'
) -> ServingMemory:
  """How weights and cache fill a mesh of data x expert x tensor devices. Activations are not counted.

  Experts are divided over `expert` and `tensor`; heads, the feed-forwards' hidden width and the vocabulary over
  `tensor`, and copied over `expert`. Router, norms, the projections down to attention's latents and those of MTP
  modules are on every device, and each of `data` holds the model anew. A sequence is cached by one (data, expert)
  shard, on each of its tensor shards: its own heads, and all of what heads share, as mla's latent.

  Args:
    config, scheme, expert, tensor: see `storage_bytes`.
    device_bytes: memory of a device.
    data: copies of the model.
    dtype: of the cache.

  Raises:
    UserError: as `storage_bytes`, or the weights do not fit.
  """
  leaves = list(_leaves(config, scheme, expert, tensor))
  held = sum(leaf_bytes for *_, leaf_bytes in leaves)
  left = int(device_bytes) - held
  if left < 0:
    raise UserError(
      f'weights in scheme {scheme!r} take {held / 1e9:.1f} GB per device on expert {expert} x tensor {tensor}, and a '
      f'device has {device_bytes / 1e9:.1f} GB; divide them over more devices or store them in fewer bits'
    )
  token_bytes = cache_bytes_per_token(config, dtype, tensor)
  replicated = sum(leaf_bytes for _, copied, leaf_bytes in leaves if copied)
  return ServingMemory(held, replicated, left, data * expert * (left // token_bytes))
