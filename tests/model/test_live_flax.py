"""docs/layer.md's example: our layer in place of the MLPs of a Flax transformer that others wrote."""

import pathlib
import re

import jax
import numpy as np
import pytest

gpt2 = pytest.importorskip(
  'transformers.models.gpt2.modeling_flax_gpt2', reason="needs a Flax model of others: pip install 'transformers<5'"
)
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch):
  """The names that the page's code defines."""
  (code,) = re.findall(r'```python\n(# gpt2_with_experts.py\n.*?)```', (ROOT / 'docs/layer.md').read_text(), re.DOTALL)
  monkeypatch.setattr(gpt2, 'FlaxGPT2MLP', gpt2.FlaxGPT2MLP)  # which the code replaces
  defined = {'__name__': 'gpt2_with_experts'}
  exec(compile(code, 'docs/layer.md', 'exec'), defined)
  return defined


def train(example, moves: bool):
  """First and last losses, and the last MaxVio of each block, over bytes of a page."""
  text = np.frombuffer((ROOT / 'docs/layer.md').read_bytes(), np.uint8).astype(np.int32)
  params, balance, opt_state = example['init'](jax.random.key(0))
  rng, still, losses = np.random.default_rng(0), balance, []
  for _ in range(120):
    tokens = np.stack([text[at : at + 65] for at in rng.integers(0, len(text) - 65, 16)])
    params, balance, opt_state, nats, stats = example['step'](params, balance, opt_state, tokens)
    balance = balance if moves else still
    losses.append(float(nats))
  return losses[0], losses[-1], [float(one.load_E.max() / one.load_E.mean() - 1) for one in stats.values()]


def test_experts_in_gpt2(example):
  first, last, violations = train(example, moves=True)
  *_, unbalanced = train(example, moves=False)
  assert (len(violations), last < first - 2) == (2, True)
  assert sum(violations) < sum(unbalanced) - 1
