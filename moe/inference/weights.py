"""The weights that generation computes with: in the compute dtype, as the forward pass uses them, a tree per layer.

Training stacks its layers to scan over them. Generation does not: a kernel that takes one layer of a stack makes XLA
copy that layer first, which for experts costs as much as the product.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import Config
from moe.inference.quantize import is_quantized, matrix_spec, quantize_params
from moe.model.parameters import is_float32
from moe.ops.varying import align
from moe.parallel import sharding
from moe.registry import CACHED_ATTENTIONS


def prepare(params: dict, bias_LE: jax.Array, config: Config, mesh, scheme: str = 'none') -> dict:
  """The weights on `mesh`, from those of training or of a checkpoint.

  Args:
    params: nested dict as `transformer.abstract_params`, of any float dtype and sharding; some may be quantised.
    bias_LE: the routing bias, a row per MoE layer and MTP module.
    config: precision.compute, to which all but the router, its bias and the norms' scales are cast.
    mesh: of `moe.parallel.mesh`.
    scheme: of `quantize.SCHEMES`: what weights that are not quantised yet become. Each shard quantises its own part.

  Returns:
    'w_embedding_VD', 'scale_out_D', 'w_head_DV' unless tied; 'layers', a list of a dict per layer, the dense ones
    first; 'mtp', a list of a dict per module. Layers with experts hold their routing bias, 'bias_E'. What attention
    multiplies its input with is one matrix, 'w_in_DF': of each shard's heads, and whatever they share on every shard.
    A shared expert of the routed ones' shape and kind is the last of them, and there is no 'shared', unless experts are
    divided over shards.
  """
  attention = CACHED_ATTENTIONS[config.model.attention]
  joined = lambda layer: layer | {'attention': attention.weights(layer['attention'])}
  make = lambda params, bias_LE: _tree(_cast(params, config.precision.compute, mesh), bias_LE)

  def local(tree):
    tree = quantize_params(_of_layers(tree, joined), scheme)
    return _of_layers(tree, _with_shared) if mesh.shape['expert'] == 1 else tree

  tree = jax.eval_shape(make, params, bias_LE)
  in_specs, out_specs = specs(tree, mesh), specs(jax.eval_shape(local, tree), mesh)
  mapped = jax.shard_map(local, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs)
  return jax.jit(lambda params, bias_LE: mapped(make(params, bias_LE)))(params, bias_LE)


NEW = {'bias_E': P(), 'w_in_DF': P(None, 'tensor')}  # what training has not


def specs(weights: dict, mesh) -> dict:
  """The PartitionSpec of every leaf of `prepare`'s result, or of its shapes."""
  sizes = dict(mesh.shape)

  def spec(path, leaf):
    name = path[-1].key
    if is_quantized(leaf):
      return jax.tree.map(lambda part: matrix_spec(name, part.ndim), leaf)
    if name in NEW:
      return NEW[name]
    return sharding.place(name, leaf.shape, sizes).compute

  return jax.tree.map_with_path(spec, weights, is_leaf=is_quantized)


def _cast(params, compute, mesh):
  sizes = dict(mesh.shape)

  def cast(path, w):
    if is_quantized(w):
      return w
    name = path[-1].key
    place = NamedSharding(mesh, sharding.place(name, w.shape, sizes).compute)  # before anything is joined
    return lax.with_sharding_constraint(w.astype(jnp.float32 if is_float32(name) else compute), place)

  return jax.tree.map_with_path(cast, params, is_leaf=is_quantized)


def _tree(params, bias_LE):
  """A tree per layer."""
  stacked, mtp = params['layers'], _listed(params.get('mtp', {}))
  layers = len(bias_LE) - len(mtp)
  moe_layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) | {'bias_E': bias_LE[i]} for i in range(layers)]
  mtp = [module | {'layer': module['layer'] | {'bias_E': bias_LE[layers + i]}} for i, module in enumerate(mtp)]
  rest = {name: leaf for name, leaf in params.items() if name not in ('dense_layers', 'layers', 'mtp')}
  return rest | {'layers': [*_listed(params.get('dense_layers', {})), *moe_layers], 'mtp': mtp}


def _listed(modules: dict) -> list[dict]:
  """Modules that NNX numbers in a dict, in order."""
  return [modules[key] for key in sorted(modules, key=int)]


def _of_layers(tree, change):
  """The tree with each layer changed, those of MTP modules too."""
  mtp = [module | {'layer': change(module['layer'])} for module in tree['mtp']]
  return tree | {'layers': [change(layer) for layer in tree['layers']], 'mtp': mtp}


def _with_shared(layer):
  """A layer with the shared expert as the last of the experts, if it is like them: then they run side by side."""
  if 'shared' not in layer:
    return layer
  shared = {name: layer['shared'][name.replace('_e', '_')] for name in layer['experts']}
  kinds = lambda tree, cut: jax.tree.map(lambda leaf: (leaf.shape[cut:], leaf.dtype), tree)
  if kinds(shared, 0) != kinds(layer['experts'], 1):
    return layer
  append = lambda many, one: jnp.concatenate(align(many, one[None]))
  rest = {name: w for name, w in layer.items() if name != 'shared'}
  return rest | {'experts': jax.tree.map(append, layer['experts'], shared)}
