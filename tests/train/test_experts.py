"""What an evaluation writes of experts, against loops over single tokens."""

import dataclasses
import json

import numpy as np
import pytest

from moe.balance import information
from moe.balance.load_history import decode
from moe.config import ModelConfig
from moe.data.batches import pack
from moe.data.corpus import Document
from moe.data.tokenizer import ByteTokenizer
from moe.files import read_json
from moe.train import experts

S, K = 8, 2
MODEL = ModelConfig(num_layers=3, num_dense_layers=1, num_experts=5, top_k=K, mtp_depth=1)


@pytest.fixture(scope='module')
def rows():
  texts = {'a/x.py': 'aabb' * 7, 'b/y.py': 'bcbc' * 5, 'a/z.py': 'ä' * 6}
  return pack([Document(name, text.encode()) for name, text in texts.items()], ByteTokenizer(), S)


def routed(rows, chosen, rng):
  """Experts, nats and weights of a batch as the evaluation step gives them, of padding too; positions masked alike."""
  batch = rows.padded_rows(chosen, len(chosen) + 1)
  segment, shape = batch['segment_BS'], (MODEL.num_routers, len(chosen) + 1, S, K)
  expert = rng.permuted(np.broadcast_to(np.arange(5), (*shape[:3], 5)), axis=-1)[..., :K].astype(np.int32)
  expert += (expert == 4) * (batch['token_BS'][None, :, :S, None] == ord('b')) * -4  # some relation to the token
  inside = segment[:, :S] > 0
  further = inside & (segment[:, 1:] == segment[:, :S])
  expert[:2][:, ~inside] = -1
  expert[2][~further] = -1
  nats = rng.random((len(chosen) + 1, S)).astype(np.float32) * further
  return expert, nats, rng.random(shape).astype(np.float32) * (expert >= 0)


@pytest.fixture(scope='module')
def watched(rows):
  """The watch, and (name, token, router, expert) of each assignment, and (name, nats) of each target, by loops."""
  rng, watch = np.random.default_rng(0), experts.Watch(rows, MODEL, ByteTokenizer())
  names = ['a/', 'b/', 'a/']
  assignments, targets, first = [], [], None
  for chosen in (np.array([0, 1, 2]), np.arange(3, len(rows))):
    expert, nats, weight = routed(rows, chosen, rng)
    watch.add(chosen, expert, nats, weight)
    first = first or [a[:, :3].reshape(3, -1, K) for a in (expert, weight)]  # rows that follow one another
    for b, row in enumerate(chosen):
      for s in range(S):
        at = row * S + s
        if at >= len(rows.token_N):
          continue
        document = sum(start <= at for start in rows.document_starts) - 1
        if at + 1 < len(rows.token_N) and at + 1 not in rows.document_starts:
          targets.append((names[document], nats[b, s]))
        for router in range(3):
          for e in expert[router, b, s]:
            if e >= 0:
              assignments.append((names[document], rows.token_N[at + (router == 2)], router, e))
  return watch, assignments, targets, first


def test_loads_and_losses_by_source(rows, watched, tmp_path):
  watch, assignments, targets, _ = watched
  watch.write(tmp_path, 7, 'full')
  found = read_json(tmp_path / experts.FILE)
  assert (found['step'], found['set'], found['by'], found['sources']) == (7, 'full', 'folder', ['a/', 'b/'])
  load_SLE = decode(found['load_SLE'], (2 * 3, 5), '').reshape(2, 3, 5)
  expected = np.zeros((2, 3, 5), int)
  for name, _, router, expert in assignments:
    expected[['a/', 'b/'].index(name), router, expert] += 1
  np.testing.assert_array_equal(load_SLE, expected)
  row = watch.row()
  for name in ('a/', 'b/'):
    nats = [nats for source, nats in targets if source == name]
    assert row['source_tokens'][name] == len(nats)
    assert row['source_loss'][name] == pytest.approx(np.mean(nats))
  assert sum(row['source_tokens'].values()) == rows.num_targets


def test_information_is_that_of_the_pairs(watched, tmp_path):
  watch, assignments, _, _ = watched
  joint_LVE = np.zeros((3, 257, 5), int)
  for _, token, router, expert in assignments:
    joint_LVE[router, token, expert] += 1
  bits, bias = information.mutual_information(joint_LVE), information.bias(joint_LVE)
  np.testing.assert_allclose(watch.row()['specialisation_bits'], bits - bias)
  watch.write(tmp_path, 7, 'full')
  found = read_json(tmp_path / experts.FILE)
  np.testing.assert_allclose(found['information_bits'], bits)
  assert found['routed_of_kinds'] == 1


def test_rare_tokens_are_not_told_apart(rows, watched, monkeypatch):
  _, assignments, _, _ = watched
  monkeypatch.setattr(experts, 'MOST_KINDS', 2)  # 'b', then 'a'
  experts._known.cache_clear()
  watch, rng = experts.Watch(rows, MODEL, ByteTokenizer()), np.random.default_rng(0)
  for chosen in (np.array([0, 1, 2]), np.arange(3, len(rows))):
    watch.add(chosen, *routed(rows, chosen, rng))
  experts._known.cache_clear()
  joint_LVE = np.zeros((3, 257, 5), int)
  for _, token, router, expert in assignments:
    joint_LVE[router, token, expert] += token in (ord('a'), ord('b'))
  np.testing.assert_array_equal(watch._joint_LVE, joint_LVE[:, [ord('b'), ord('a')]])


def test_the_text_that_is_shown(rows, watched, tmp_path):
  watch, _, _, (expert_LSK, weight_LSK) = watched
  watch.write(tmp_path, 7, 'sample')
  text = read_json(tmp_path / experts.FILE)['text']
  assert text['token_ids'] == rows.token_N[: 3 * S].tolist()
  assert ''.join(text['texts']) == ('aabb' * 7)[: 3 * S - 1]
  np.testing.assert_array_equal(decode(text['expert_plus_1'], (9 * S, K), '').reshape(3, -1, K) - 1, expert_LSK)
  weights = decode(text['weight'], (9 * S, K), '').reshape(3, -1, K) / experts.WEIGHT_STEPS
  np.testing.assert_allclose(weights, weight_LSK, atol=1e-4)


def test_the_text_ends_where_rows_do_not_follow(rows, tmp_path):
  watch = experts.Watch(rows, MODEL, ByteTokenizer())
  watch.add(np.array([1, 2, 5]), *routed(rows, np.array([1, 2, 5]), np.random.default_rng(0)))
  watch.write(tmp_path, 7, 'sample')
  assert read_json(tmp_path / experts.FILE)['text']['token_ids'] == rows.token_N[S : 3 * S].tolist()


def test_text_without_names_is_of_one_source(rows):
  watch = experts.Watch(dataclasses.replace(rows, names=()), MODEL, ByteTokenizer())
  assert watch._text.sources.names == ['all text']
  json.dumps(watch.row(), allow_nan=False)
