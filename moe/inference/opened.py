"""A trained model to look into from Python: which experts its routers give the tokens of a text to."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe.config import MeshConfig
from moe.data.text import pieces
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError, short
from moe.inference.load import Model, load
from moe.train.step import BATCH_SPEC, make_eval_step
from moe.validation import utf8

LENGTH_MULTIPLE = 128  # texts are padded to it, so that not every length compiles a program of its own
MOST_TOKENS = 1 << 17  # of one text


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
  """What each router gave each token of a text. Rows of `experts` and `weights` have their names in `layers`.

  The routers of MTP modules, which come last, are asked about the token *after* each: 'MTP i' at token t has seen token
  t + i + 1 as well, and where there is none it was not asked, and its experts are -1 and its weights 0.
  """

  token_ids: np.ndarray  # int32 [tokens]
  texts: list[str]  # [tokens]; '' for BOS and for a token that ends within a character, which the next one brings
  layers: list[str]  # [layers], such as 'layer 1' and 'MTP 0'
  experts: np.ndarray  # int32 [layers, tokens, k], the highest score first, bias included
  weights: np.ndarray  # float32 [layers, tokens, k], what the experts' outputs are multiplied by; no bias in them
  nats: np.ndarray  # float32 [tokens], cross-entropy of the token after each; 0 after the last


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
  """A model that `moe.open` has loaded; `model` has its config, parameters, router bias and tokenizer."""

  model: Model
  _step: Callable[..., dict[str, jax.Array]]  # of `make_eval_step`

  def route(self, text: str | Sequence[int]) -> Routes:
    """What the routers decide about a text, by the forward pass that evaluation runs: nothing is dropped.

    Args:
      text: a document from its beginning, or token ids, to which no BOS is added.

    Raises:
      UserError: neither of the two, no tokens, too many, or ids that the model does not know.
    """
    config, tokenizer, mesh = self.model.config, self.model.tokenizer, self.model.mesh
    ids = _token_ids(text, tokenizer)
    if ids.ndim != 1 or not 0 < len(ids) <= MOST_TOKENS:
      raise UserError(f'route takes 1 to {MOST_TOKENS:,} tokens, not an array of shape {ids.shape}')
    if ((ids < 0) | (ids >= config.model.vocab_size)).any():
      raise UserError(f'route was given a token id outside 0 to {config.model.vocab_size - 1}, which the model knows')
    # Other shards of the batch get padding: the text is one sequence.
    shape = 1, mesh.shape['data'] * mesh.shape['expert'], -(-len(ids) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE + 1
    token_1BS, segment_1BS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    token_1BS[0, 0, : len(ids)], segment_1BS[0, 0, : len(ids)] = ids, 1
    place = lambda a: jax.make_array_from_callback(a.shape, NamedSharding(mesh, BATCH_SPEC), a.__getitem__)
    batch = {'token_BS': place(token_1BS), 'segment_BS': place(segment_1BS)}
    found = self._step(self.model.params, self.model.bias_LE, batch)
    expert, weight, nats = (np.asarray(found[key]) for key in ('expert_LBSK', 'weight_LBSK', 'nats_BS'))
    return Routes(
      token_ids=ids.astype(np.int32),
      texts=pieces(tokenizer, ids.tolist()),
      layers=config.model.router_names,
      experts=expert[:, 0, : len(ids)],
      weights=weight[:, 0, : len(ids)],
      nats=nats[0, : len(ids)],
    )


def _token_ids(text, tokenizer: Tokenizer) -> np.ndarray:
  """int64, of any shape. Raises UserError: neither text nor integers, or text that is not UTF-8."""
  if isinstance(text, str):
    return np.array([*tokenizer.begin_ids, *tokenizer.encode(utf8('the text', text))], np.int64)
  try:
    ids = np.asarray(text)
  except (TypeError, ValueError):  # lists of several lengths, ...
    ids = np.array(None)
  if ids.size and ids.dtype.kind not in 'iu':
    raise UserError(f'route takes text or a list of token ids, not {short(text)}')
  return ids.astype(np.int64)


def open(path: str | Path, mesh: MeshConfig | None = None, compute: str = '', tokenizer: str = '') -> Opened:
  """Loads a run's newest checkpoint, or a Hugging Face folder: all that `moe generate` can.

      import moe
      routes = moe.open('runs/tiny').route('def main():')
      routes.experts[routes.layers.index('layer 2')]     # [tokens, k]

  Args:
    path: run directory, or folder of a DeepSeek-V3 checkpoint.
    mesh: where to; one device if not given.
    compute: 'float32' or 'bfloat16'; '': as in training, or as in the folder.
    tokenizer: 'byte' or the path of a tokenizer.json; '': that of the run or folder.

  Raises:
    UserError: as `moe.inference.load.load`.
  """
  model = load(path, mesh or MeshConfig(), compute, False, tokenizer)
  return Opened(model, make_eval_step(model.config, model.mesh))
