"""What an evaluation sees experts do: which text they are given, and what that text costs.

`Watch` is told of every batch that was evaluated, what each router gave each token; a few numbers of it are in each row
of evals.jsonl, and FILE has the rest of the newest evaluation. docs/see.md says what of them the report shows.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.balance import information
from moe.balance.experts_file import FILE, WEIGHT_STEPS
from moe.balance.load_history import encode
from moe.config import ModelConfig
from moe.data import sources
from moe.data.batches import Rows
from moe.data.text import pieces
from moe.data.tokenizer import Tokenizer
from moe.files import write_json

MOST_KINDS = 512  # token ids that are told apart, the commonest: counts of all would not fit where V and E are large
MOST_SHOWN = 256  # tokens of the text whose routing is kept


class _Text(NamedTuple):
  """What is known of the validation text before anything is evaluated."""

  sources: sources.Sources
  kind_V: np.ndarray  # a token id's place among the commonest, MOST_KINDS for all others
  num_kinds: int


@functools.lru_cache(2)
def _known(rows: Rows) -> _Text:
  sizes = np.diff(rows.document_starts, append=len(rows.token_N))
  count_V = np.bincount(rows.token_N)
  common = np.argsort(-count_V, kind='stable')[:MOST_KINDS]
  common = common[count_V[common] > 0]
  kind_V = np.full(len(count_V), MOST_KINDS)
  kind_V[common] = np.arange(len(common))
  names = rows.names or [''] * len(sizes)
  return _Text(sources.group(names, sizes), kind_V, len(common))


class Watch:
  """Adds up, over the batches of one evaluation, what routers gave to whom."""

  def __init__(self, rows: Rows, model: ModelConfig, tokenizer: Tokenizer):
    self._rows, self._model, self._tokenizer, self._text = rows, model, tokenizer, _known(rows)
    count, L, E = len(self._text.sources.names), model.num_routers, model.num_experts
    self._load_SLE = np.zeros((count, L, E), np.int64)
    self._joint_LVE = np.zeros((L, self._text.num_kinds, E), np.int64)
    self._nats_S, self._targets_S = np.zeros(count), np.zeros(count, np.int64)
    self._shown: dict[str, Any] = {}

  def add(self, chosen: np.ndarray, expert_LBSK: np.ndarray, nats_BS: np.ndarray, weight_LBSK) -> None:
    """A batch: rows `chosen` of the text, and of its first rows what `make_eval_step` says of each token.

    Weights may still be on the device: only the first batch's are read.

    Args:
      chosen: int64 [rows], numbers of the rows; batches may have more, which are padding.
      expert_LBSK: int32 experts of each token by router, -1 where it was not routed.
      nats_BS: float32 cross-entropy of the token after each, 0 where it does not count.
      weight_LBSK: float32 gate weights.
    """
    rows, (count, _, E), kinds = self._rows, self._load_SLE.shape, self._joint_LVE.shape[1]
    at_BS = np.asarray(chosen)[:, None] * rows.seq_len + np.arange(rows.seq_len)
    expert_LBSK, nats_BS = np.asarray(expert_LBSK)[:, : len(at_BS)], np.asarray(nats_BS)[: len(at_BS)]
    inside: Callable[[np.ndarray], np.ndarray] = lambda at: np.minimum(at, len(rows.token_N) - 1)
    document_BS = np.searchsorted(rows.document_starts, inside(at_BS), side='right') - 1
    source_BS = self._text.sources.of_document[document_BS]
    target_BS = np.searchsorted(rows.document_starts, inside(at_BS + 1), side='right') - 1
    counted_BS = (target_BS == document_BS) & (at_BS + 1 < len(rows.token_N))
    self._nats_S += np.bincount(source_BS[counted_BS], nats_BS[counted_BS], count)
    self._targets_S += np.bincount(source_BS[counted_BS], minlength=count)
    for router, expert_BSK in enumerate(expert_LBSK):
      # The router of an MTP module is asked about the token so many further on.
      ahead = max(0, router - self._model.num_moe_layers + 1)
      kind_BS = self._text.kind_V[rows.token_N[inside(at_BS + ahead)]]
      routed_BSK = expert_BSK >= 0
      in_cells = lambda place_BS: place_BS[..., None] * E + expert_BSK  # noqa: B023
      cells = in_cells(source_BS)[routed_BSK]
      self._load_SLE[:, router] += np.bincount(cells, minlength=count * E).reshape(count, E)
      cells = in_cells(kind_BS)[routed_BSK & (kind_BS < MOST_KINDS)[..., None]]
      self._joint_LVE[router] += np.bincount(cells, minlength=kinds * E).reshape(kinds, E)
    if not self._shown:
      self._keep_text(at_BS, expert_LBSK, np.asarray(weight_LBSK)[:, : len(at_BS)])

  def _keep_text(self, at_BS, expert_LBSK, weight_LBSK):
    """Of the first row, and of those that go on from it."""
    rows = next((b for b in range(1, len(at_BS)) if at_BS[b, 0] != at_BS[b - 1, -1] + 1), len(at_BS))
    at = at_BS[:rows].ravel()[:MOST_SHOWN]
    ids = self._rows.token_N[at[at < len(self._rows.token_N)]].tolist()
    in_one = lambda a_LBSK: a_LBSK[:, :rows].reshape(len(a_LBSK), -1, a_LBSK.shape[-1])[:, : len(ids)]
    flat = lambda a_LBSK: encode(in_one(a_LBSK).reshape(-1, a_LBSK.shape[-1]))
    self._shown = {
      'token_ids': ids,
      'texts': pieces(self._tokenizer, ids),
      'expert_plus_1': flat(expert_LBSK + 1),  # 0: not routed
      'weight': flat(np.rint(weight_LBSK * WEIGHT_STEPS)),
    }

  @functools.cached_property
  def _bits(self) -> tuple[np.ndarray, np.ndarray]:
    """[L] each: mutual information of token and expert, and its bias; to be asked when all batches are added."""
    return information.mutual_information(self._joint_LVE), information.bias(self._joint_LVE)

  def row(self) -> dict[str, Any]:
    """For evals.jsonl: 'specialisation_bits' [L], and 'source_loss' and 'source_tokens' by source."""
    bits_L, bias_L = self._bits
    some = [i for i, targets in enumerate(self._targets_S) if targets]
    names = self._text.sources.names
    return {
      'specialisation_bits': (bits_L - bias_L).tolist(),
      'source_loss': {names[i]: float(self._nats_S[i] / self._targets_S[i]) for i in some},
      'source_tokens': {names[i]: int(self._targets_S[i]) for i in some},
    }

  def write(self, folder: Path, step: int, of: str) -> None:
    """Writes FILE of a run. Raises UserError.

    Args:
      of: 'full' or 'sample', the text that was evaluated.
    """
    joint_LVE, where, (bits_L, bias_L) = self._joint_LVE, self._text.sources, self._bits
    found = {
      'step': step,
      'set': of,
      'by': where.by,
      'sources': where.names,
      'load_SLE': encode(self._load_SLE.reshape(-1, self._load_SLE.shape[-1])),
      'token_kinds': self._text.num_kinds,
      'routed_of_kinds': float(joint_LVE.sum() / max(1, int(self._load_SLE.sum()))),
      'information_bits': bits_L.tolist(),
      'information_bias_bits': bias_L.tolist(),
      'expert_bits': information.entropy(joint_LVE.sum(1)).tolist(),
      'text': self._shown,
    }
    write_json(folder / FILE, found)
