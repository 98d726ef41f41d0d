"""Reads experts.json, in which a run says what its experts did in the newest evaluation; nothing in it is believed."""

import dataclasses
import math
import os
import pathlib

import numpy as np

from moe.balance import load_history
from moe.balance.experts_file import FILE, WEIGHT_STEPS
from moe.errors import UserError
from moe.files import read_json, step_of

MOST_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """Routing of some tokens of the validation text."""

  token_ids: list[int]
  texts: list[str]
  expert_LTK: np.ndarray  # int64, -1 where a token was not routed
  weight_LTK: np.ndarray  # float64


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
  """What `moe.train.experts.Watch.write` wrote; L routers."""

  step: int
  is_sample: bool  # of the validation text
  by: str  # what tells sources apart: 'suffix', 'folder', 'file' or ''
  sources: list[str]
  load_SLE: np.ndarray  # int64 [sources, L, E]
  token_kinds: int  # token ids that were told apart
  routed_of_kinds: float  # share of the assignments that are of those
  information_bits: list[float]  # [L], mutual information of token and expert, plug-in
  bias_bits: list[float]  # [L], what of it is expected of tokens that say nothing
  expert_bits: list[float]  # [L], entropy of the expert, which the information cannot exceed
  text: Text | None


def load_experts(folder: pathlib.Path, shape: tuple[int, int], top_k: int) -> Experts | None:
  """What a run's experts did; None if it does not say, as runs of older versions.

  Args:
    shape: (L, E).

  Raises:
    UserError: the file was changed after it was written, or is not of a run of this shape.
  """
  path = folder / FILE
  if not os.path.lexists(path):
    return None
  found = read_json(path)
  try:
    sources = _list(found['sources'], str)
    load = load_history.decode(found['load_SLE'], (len(sources) * shape[0], shape[1]), str(path))
    bits = ('information_bits', 'information_bias_bits', 'expert_bits')
    information_bits, bias_bits, expert_bits = (_list(found[key], float, shape[0]) for key in bits)
    return Experts(
      step_of(found, str(path)),
      found['set'] == 'sample',
      _typed(found['by'], str),
      sources,
      load.reshape(len(sources), *shape),
      _typed(found['token_kinds'], int),
      _typed(found['routed_of_kinds'], float),
      information_bits,
      bias_bits,
      expert_bits,
      _text(found['text'], shape[0], top_k, path) if found['text'] else None,
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} is damaged: {error!r}; delete it, and the next evaluation writes it again') from error


def _text(found, routers, top_k, path):
  ids = _list(found['token_ids'], int)
  if len(ids) > MOST_TOKENS:
    raise ValueError(f'{len(ids)} tokens')
  read = lambda key: load_history.decode(found[key], (routers * len(ids), top_k), str(path))
  shape = routers, len(ids), top_k
  expert_LTK, weight_LTK = read('expert_plus_1').reshape(shape) - 1, read('weight').reshape(shape) / WEIGHT_STEPS
  return Text(ids, _list(found['texts'], str, len(ids)), expert_LTK, weight_LTK)


def _list(value, kind, length=None):
  if not isinstance(value, list) or (length is not None and len(value) != length):
    raise TypeError(f'not a list of {length or "some"} {kind.__name__}')
  return [_typed(one, kind) for one in value]


def _typed(value, kind):
  if type(value) is not kind or (kind is float and not math.isfinite(value)):
    raise TypeError(f'{str(value)[:40]!r} is no {kind.__name__}')
  return value
