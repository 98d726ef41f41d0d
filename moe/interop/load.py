"""A checkpoint in Hugging Face's format, straight to the shards of a mesh: `open_checkpoint`, then `load`.

Files are mapped, not read: for each device, its part of an array is put together from the slices of the files' tensors
that it needs, sent there, and dropped. So a host holds one device's part of one array, and what it dequantises of a few
tensors.
"""

import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import Config, ModelConfig
from moe.errors import UserError
from moe.files import digests
from moe.interop import formats, hf_config, names, shards
from moe.model import transformer
from moe.model.parameters import is_float32
from moe.ops.weights import Fp8Weight, Mxfp4Weight
from moe.parallel import sharding
from moe.train.checkpoint import flatten

ROWS = 4096  # compared at a time
ROTARY = '.rotary_emb.inv_freq'  # frequencies, which follow from the config; some files hold them
THREADS = 8  # a transposed copy is bound by the memory's latency
FEED_FORWARD = ('_DF', '_FD', '_eDF', '_eFD')  # suffixes of the weights that can stay quantised


class Checkpoint(NamedTuple):
  """A folder whose tensors are all accounted for, none read yet.

  model: its settings. stored: its tensors by name. remarks: lines for the user.
  """

  folder: Path
  model: ModelConfig
  stored: dict[str, shards.Stored]
  remarks: list[str]


def open_checkpoint(folder: Path) -> Checkpoint:
  """Opens the checkpoint in `folder`.

  Raises:
    UserError: not a DeepSeek-V3 checkpoint, or one of its tensors is unknown, missing, misshapen or damaged.
  """
  file = folder / 'config.json'
  model, remarks = hf_config.from_hf(hf_config.read(folder), file), []
  stored = {name: one for name, one in shards.open_folder(folder).items() if not name.endswith(ROTARY)}
  stored = formats.unified(stored)
  if model.mtp_depth and not any(name.startswith(f'model.layers.{model.num_layers}.') for name in stored):
    remarks.append(f'{file} names {model.mtp_depth} MTP module(s) and the files hold none: loaded without')
    model = dataclasses.replace(model, mtp_depth=0)
  _check_sizes(model, stored, file)
  tensors, copies, shapes = names.table(model), names.copies(model), array_shapes(model)
  if model.tie_embeddings:
    copies.append(names.head(model))
  expected = {tensor.name: tensor.shape(shapes) for tensor in tensors + copies}
  for name, found in stored.items():
    if name not in expected and formats.base(name) not in expected:
      raise UserError(f'{found.file}: unknown tensor {name}')
  present = [name for name in expected if name in stored or name + formats.PACKED in stored]
  for tensor in tensors:
    if tensor.name not in present:
      raise UserError(f'{folder}: tensor {tensor.name} is missing')
  for name in present:
    formats.check(name, stored, expected[name])
  for tensor in copies:
    if tensor.name in present:
      _check_copy(stored, tensor, expected[tensor.name])
  digests.check(folder)
  return Checkpoint(folder, model, stored, remarks)


def _check_sizes(model, stored, file):
  """Refuses what the files cannot hold, before the tables of a model of that size are made."""
  if names.EMBEDDING in stored:  # it says best which of vocabulary and width is wrong
    formats.check(names.EMBEDDING, stored, (model.vocab_size, model.d_model))
  largest = max((side for one in stored.values() for side in one.shape), default=0)
  layers, experts = (
    len({found[1] for name in stored if (found := re.match(pattern, name))})
    for pattern in (r'model\.layers\.(\d+)\.', r'model\.layers\.\d+\.mlp\.experts\.(\d+)\.')
  )
  limits = {'num_layers': layers, 'mtp_depth': layers - model.num_layers, 'num_experts': experts}
  sides = [ours for ours in hf_config.SIDES if ours != 'd_ff' or model.num_dense_layers]
  for ours, limit in (limits | dict.fromkeys(sides, largest)).items():
    if getattr(model, ours) > limit:
      held = f'no tensor has a side above {limit}' if ours in sides else f'the files hold {max(limit, 0)}'
      raise UserError(f'{file} has {hf_config.theirs(ours)} = {getattr(model, ours)}, but {held}')


def array_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters, and of 'bias_LE', by dotted path."""
  params = flatten(transformer.abstract_params(Config(model=model)))
  return {name: leaf.shape for name, leaf in params.items()} | {'bias_LE': (model.num_routers, model.num_experts)}


def specs(model: ModelConfig, mesh, stored: bool = False) -> dict:
  """The PartitionSpec of each parameter: as the forward pass uses it, or as a training state stores it."""
  place = sharding.place_tree(transformer.abstract_params(Config(model=model)), mesh)
  chosen = lambda placement: placement.stored if stored else placement.compute
  return jax.tree.map(chosen, place, is_leaf=lambda node: isinstance(node, sharding.Placement))


def load(checkpoint: Checkpoint, mesh, specs: dict, dtype: str, quantized: bool = False) -> tuple[dict, jax.Array]:
  """The parameters on a mesh. In a run of several processes, each reads what its devices hold.

  Args:
    checkpoint: from `open_checkpoint`.
    mesh: of `moe.parallel.mesh`.
    specs: nested dict as `transformer.abstract_params` with the PartitionSpec of each parameter, such as `specs` gives.
    dtype: 'float32' or 'bfloat16'; parameters that `is_float32` names are float32 in any case.
    quantized: leave the weights of feed-forwards and experts that the files hold in FP8 or MXFP4 as they are, as
      `Fp8Weight` and `Mxfp4Weight`, laid out by the same spec; the others are dequantised.

  Returns:
    Global arrays as the nested dict of `transformer.abstract_params`, the vocabulary's padding 0; bias_LE, replicated.

  Raises:
    UserError: a number that is not finite; quantised blocks that would lie on two devices, or an array quantised in
      parts.
  """
  shapes, flat = array_shapes(checkpoint.model), flatten(specs)
  sources: dict[str, list[tuple[names.Tensor, int]]] = {name: [] for name in shapes}
  for tensor in names.table(checkpoint.model):
    for number, view in enumerate(tensor.views):
      sources[view.name].append((tensor, number))
  arrays = {}
  for name, shape in tqdm.tqdm(shapes.items(), 'loading', unit='array', disable=None):
    place, last = NamedSharding(mesh, flat.get(name, P())), name.rsplit('.', 1)[-1]
    kinds = {formats.kind_of(checkpoint.stored, tensor.name) for tensor, _ in sources[name]}
    if quantized and kinds != {None} and last.endswith(FEED_FORWARD):
      arrays[name] = _quantized(checkpoint, name, shape, place, sources[name], kinds)
    else:
      kept = name == 'bias_LE' or is_float32(last)
      numbers = shards.FLOATS[shards.NAMED['float32' if kept else dtype]]
      values = _values(checkpoint.stored, name, shapes, sources[name], numbers)
      arrays[name] = _assemble(shape, place, values)
  bias_LE = arrays.pop('bias_LE')
  abstract = transformer.abstract_params(Config(model=checkpoint.model))
  return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in flatten(abstract)]), bias_LE


def _values(stored, name, shapes, sources, dtype) -> Callable:
  """A function from a box of the array to its values on the host."""

  def values(box):
    found = np.zeros([edge.stop - edge.start for edge in box], dtype)  # zeros: the vocabulary's padding

    def fill(source):
      tensor, number = source
      if meet := names.overlap(tensor.views[number], shapes[name], box):
        in_box, in_view = meet
        rows, columns = tensor.find(number, in_view, shapes)
        part = formats.read(stored, tensor.name, rows, columns)
        found[in_box] = (part.T if tensor.inputs else part).reshape(found[in_box].shape)

    with ThreadPoolExecutor(THREADS) as pool:
      list(pool.map(fill, sources))
    return found

  return values


def _quantized(checkpoint, name, shape, place, sources, kinds):
  """The weight as its files hold it, transposed: [..., inputs, outputs]."""
  if len(kinds) > 1:
    raise UserError(f'{checkpoint.folder}: {name} is quantised in some layers or experts only; load it dequantised')
  (kind,) = kinds
  leaves = []
  for suffix, per_K, per_N, _ in formats.PARTS[kind]:
    for axis, per in ((-2, per_K), (-1, per_N)):
      size, here = shape[axis], place.shard_shape(shape)[axis]
      if size != here and here % per:
        raise UserError(
          f'{name}: {here} of {size} values on each device are no multiple of the {per} that share a scale; load it '
          'dequantised or on fewer devices'
        )
    *lead, K, N = shape
    small = (*lead, -(-K // per_K), -(-N // per_N))
    leaves.append(_assemble(small, place, _raw(checkpoint.stored, name, small, sources, suffix)))
  return Fp8Weight(*leaves) if kind == 'fp8' else Mxfp4Weight(*leaves)


def _raw(stored, name, shape, sources, suffix) -> Callable:
  """As `_values`, of the files' own numbers; scales become float32."""
  files = [(tensor.views[0], stored[tensor.name + suffix]) for tensor, _ in sources]
  of_scales = files[0][1].dtype in (*shards.FLOATS, shards.EXPONENT)
  dtype = np.float32 if of_scales else shards.DTYPES[files[0][1].dtype]

  def values(box):
    found = np.empty([edge.stop - edge.start for edge in box], dtype)
    for view, file in files:
      if meet := names.overlap(view, shape, box):
        in_box, in_view = meet
        found[in_box] = file.read().T[in_view]
        if suffix != formats.PACKED:
          formats.check_finite(found[in_box], file.file, f'{name}, {suffix or "weights"}')
    return found

  return values


def _assemble(shape, place, values) -> jax.Array:
  """The global array whose parts `values` makes, one after the other; devices with the same part share one."""
  devices_of: dict[tuple, list[jax.Device]] = {}
  parts = []
  for device, index in place.addressable_devices_indices_map(shape).items():
    box = tuple(edge.indices(size)[:2] for edge, size in zip(index, shape, strict=True))
    devices_of.setdefault(box, []).append(device)
  for box, devices in devices_of.items():
    part = values(tuple(slice(*edge) for edge in box))
    parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])  # then the host's can go
  return jax.make_array_from_single_device_arrays(shape, place, parts)


def _check_copy(stored, tensor, shape):
  of = names.EMBEDDING if tensor.views[0].name == 'w_embedding_VD' else names.HEAD
  columns = np.arange(shape[1])
  for start in range(0, shape[0], ROWS):
    rows = np.arange(start, min(start + ROWS, shape[0]))
    if not np.array_equal(formats.read(stored, tensor.name, rows, columns), formats.read(stored, of, rows, columns)):
      raise UserError(f'{stored[tensor.name].file}: {tensor.name} differs from {of}, which the model uses in its place')
