"""The table of names: each tensor of a DeepSeek-V3 checkpoint, and the arrays of ours that it is made of.

Ours are named by dotted path, as in `moe.train.checkpoint.flatten`; the router bias is 'bias_LE'. Rotary pairs are
interleaved there as here, so no rows are permuted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe.config import ModelConfig

EMBEDDING, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


class View(NamedTuple):
  """A part of one of our arrays: `place` goes between numpy's brackets."""

  name: str
  place: tuple = ()


class Tensor(NamedTuple):
  """One tensor of the checkpoint.

  name: theirs. views: our parts, joined along `axis`. inputs: how many leading axes of the joined array are the inputs
  of a linear map, which they store as [outputs, inputs]; 0 if the array is stored as it is.
  """

  name: str
  views: tuple[View, ...]
  inputs: int = 1
  axis: int = -1

  @property
  def is_bias(self) -> bool:
    """Whether this is a router bias, float32 in every checkpoint."""
    return self.views[0].name == 'bias_LE'

  @property
  def is_expert(self) -> bool:
    """Whether this is a matrix of a routed expert."""
    return '.experts.' in self.name

  @property
  def is_projection(self) -> bool:
    """Whether this is one of the matrices that DeepSeek's own files hold in FP8."""
    kept = ('w_router_DE', 'w_head_DV', 'w_embedding_DD')
    return self.inputs > 0 and self.views[0].name.rsplit('.', 1)[-1] not in kept

  def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Its shape there, from the shapes of our arrays."""
    joined = self._joined(self._parts(shapes))
    if not self.inputs:
      return joined
    return math.prod(joined[self.inputs :]), math.prod(joined[: self.inputs])

  def pack(self, read: Callable[[View], np.ndarray]) -> np.ndarray:
    """The tensor as it stands in their files, contiguous, in our dtype; `read` gives the values of a view."""
    joined = np.concatenate([read(view) for view in self.views], self.axis)
    if self.inputs:
      joined = joined.reshape(math.prod(joined.shape[: self.inputs]), -1).T
    return np.ascontiguousarray(joined)

  def find(self, number: int, part: tuple[slice, ...], shapes: dict[str, tuple[int, ...]]):
    """Rows and columns of this tensor that hold `part`, slices of each axis, of the view with this number.

    A vector counts as one column. The values there, transposed if `inputs` is not 0 and reshaped, are the part.
    """
    parts = self._parts(shapes)
    joined, cut = self._joined(parts), list(part)
    before = sum(shape[self.axis] for shape in parts[:number])
    cut[self.axis] = slice(cut[self.axis].start + before, cut[self.axis].stop + before)
    middle = self.inputs or 1
    first, last = (
      np.arange(math.prod(sizes)).reshape(sizes)[tuple(inside)].ravel()
      for sizes, inside in ((joined[:middle], cut[:middle]), (joined[middle:], cut[middle:]))
    )
    return (last, first) if self.inputs else (first, last)

  def _parts(self, shapes):
    # The shape of a part is numpy's to tell: one number, seen as an array of any size.
    return [np.broadcast_to(np.float32(0), shapes[view.name])[view.place].shape for view in self.views]

  def _joined(self, shapes):
    joined = list(shapes[0])
    joined[self.axis] = sum(shape[self.axis] for shape in shapes)
    return tuple(joined)


def overlap(view: View, shape: tuple[int, ...], box: tuple[slice, ...]) -> tuple[tuple, tuple] | None:
  """Where a view of an array of `shape` meets a box of it, given as slices with start and stop.

  Returns:
    The common part in coordinates of the box and of the view, each to go between numpy's brackets, or None.
  """
  in_box, in_view = [], []
  for axis, (size, edge) in enumerate(zip(shape, box, strict=True)):
    item = view.place[axis] if axis < len(view.place) else slice(None)
    start, stop = item.indices(size)[:2] if isinstance(item, slice) else (item, item + 1)
    first, last = max(edge.start, start), min(edge.stop, stop)
    if first >= last:
      return None
    if isinstance(item, slice):
      in_box.append(slice(first - edge.start, last - edge.start))
      in_view.append(slice(first - start, last - start))
    else:
      in_box.append(first - edge.start)
  return tuple(in_box), tuple(in_view)


def table(model: ModelConfig) -> list[Tensor]:
  """Every tensor a checkpoint of this model must hold, in the order of the layers."""
  tensors = [embedding(model)]
  for number in range(model.num_layers):
    theirs = f'model.layers.{number}'
    moe_index = number - model.num_dense_layers
    if moe_index < 0:
      tensors += _dense_layer(model, theirs, f'dense_layers.{number}')
    else:
      tensors += _moe_layer(model, theirs, 'layers', (moe_index,), moe_index)
  for depth in range(model.mtp_depth):
    tensors += _mtp_module(model, depth)
  tensors.append(Tensor('model.norm.weight', (View('scale_out_D'),), 0))
  return tensors if model.tie_embeddings else [*tensors, head(model)]


def copies(model: ModelConfig) -> list[Tensor]:
  """Embedding and head once more for each MTP module, as DeepSeek's own files have them."""
  layers = [f'model.layers.{model.num_layers + depth}' for depth in range(model.mtp_depth)]
  embeddings = [embedding(model, f'{layer}.embed_tokens.weight') for layer in layers]
  return embeddings + [head(model, f'{layer}.shared_head.head.weight') for layer in layers]


def embedding(model: ModelConfig, name: str = EMBEDDING) -> Tensor:
  """[vocabulary, D] without the padding."""
  return Tensor(name, (View('w_embedding_VD', (slice(0, model.vocab_size),)),), 0)


def head(model: ModelConfig, name: str = HEAD) -> Tensor:
  """[vocabulary, D] without the padding; the embedding if that is tied."""
  if model.tie_embeddings:
    return embedding(model, name)
  return Tensor(name, (View('w_head_DV', (slice(None), slice(0, model.vocab_size))),))


def _dense_layer(model, theirs, ours):
  return [*_norms_and_attention(model, theirs, ours, ()), *_ffn(f'{theirs}.mlp', f'{ours}.ffn', ())]


def _moe_layer(model, theirs, ours, index, router):
  """`index` picks the layer out of stacked arrays, `router` its row of bias_LE."""
  tensors = _norms_and_attention(model, theirs, ours, index)
  tensors.append(Tensor(f'{theirs}.mlp.gate.weight', (View(f'{ours}.w_router_DE', index),)))
  if model.score_fn == 'sigmoid':  # DeepSeek-V2 has no bias; ours is 0
    tensors.append(Tensor(f'{theirs}.mlp.gate.e_score_correction_bias', (View('bias_LE', (router,)),), 0))
  for kind, name in (('gate', 'w_gate_eDF'), ('up', 'w_up_eDF'), ('down', 'w_down_eFD')):
    for expert in range(model.num_experts):  # inside, so that one of our arrays is read at a time
      view = View(f'{ours}.experts.{name}', (*index, expert))
      tensors.append(Tensor(f'{theirs}.mlp.experts.{expert}.{kind}_proj.weight', (view,)))
  if model.num_shared_experts:
    tensors += _ffn(f'{theirs}.mlp.shared_experts', f'{ours}.shared', index)
  return tensors


def _mtp_module(model, depth):
  theirs, ours = f'model.layers.{model.num_layers + depth}', f'mtp.{depth}'
  return [
    Tensor(f'{theirs}.enorm.weight', (View(f'{ours}.scale_embedding_D'),), 0),
    Tensor(f'{theirs}.hnorm.weight', (View(f'{ours}.scale_hidden_D'),), 0),
    # The paper writes M [hidden; embedding]. The files have the embedding first: transformers (modeling_layers.py),
    # vLLM (deepseek_mtp.py) and SGLang (deepseek_nextn.py) all multiply with cat([enorm(embedding), hnorm(hidden)]).
    Tensor(f'{theirs}.eh_proj.weight', (View(f'{ours}.w_embedding_DD'), View(f'{ours}.w_hidden_DD')), inputs=1, axis=0),
    Tensor(f'{theirs}.shared_head.norm.weight', (View(f'{ours}.scale_out_D'),), 0),
    *_moe_layer(model, theirs, f'{ours}.layer', (), model.num_moe_layers + depth),
  ]


def _norms_and_attention(model, theirs, ours, index):
  def view(name):
    return View(f'{ours}.attention.{name}', index)

  tensors = [
    Tensor(f'{theirs}.input_layernorm.weight', (View(f'{ours}.scale_attention_D', index),), 0),
    Tensor(f'{theirs}.post_attention_layernorm.weight', (View(f'{ours}.scale_ffn_D', index),), 0),
  ]
  theirs = f'{theirs}.self_attn'
  if model.q_lora_rank:
    tensors += [
      Tensor(f'{theirs}.q_a_proj.weight', (view('w_query_down_DA'),)),
      Tensor(f'{theirs}.q_a_layernorm.weight', (view('scale_query_A'),), 0),
      Tensor(f'{theirs}.q_b_proj.weight', (view('w_query_AHN'), view('w_query_rope_AHR'))),
    ]
  else:
    tensors.append(Tensor(f'{theirs}.q_proj.weight', (view('w_query_DHN'), view('w_query_rope_DHR'))))
  return [
    *tensors,
    Tensor(f'{theirs}.kv_a_proj_with_mqa.weight', (view('w_kv_down_DC'), view('w_key_rope_DR'))),
    Tensor(f'{theirs}.kv_a_layernorm.weight', (view('scale_kv_C'),), 0),
    Tensor(f'{theirs}.kv_b_proj.weight', (view('w_key_CHN'), view('w_value_CHU'))),
    Tensor(f'{theirs}.o_proj.weight', (view('w_out_HUD'),), inputs=2),
  ]


def _ffn(theirs, ours, index):
  kinds = (('gate', 'w_gate_DF'), ('up', 'w_up_DF'), ('down', 'w_down_FD'))
  return [Tensor(f'{theirs}.{kind}_proj.weight', (View(f'{ours}.{name}', index),)) for kind, name in kinds]
