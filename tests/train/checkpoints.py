"""Checkpoints of a small state, for the tests of what they give back and of what is noticed."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import OptimizerConfig
from moe.files import digests
from moe.train.checkpoint import Checkpoints, abstract_like
from moe.train.optimizer import make_optimizer
from moe.train.state import TrainState

META = {'tokens': 7, 'seed': 3}


def made(step, **settings):
  """A state of some numbers that follow from the step, with a rule that remembers more than its bias."""
  rng = np.random.default_rng(step)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
  params = {'layers': {'w_router_DE': draw(2, 5, 4), 'w_up_eDF': draw(2, 4, 5, 3)}, 'scale_out_D': draw(5)}
  optimizer = make_optimizer(OptimizerConfig(**settings), 10).init(params)
  optimizer = jax.tree.map(lambda leaf: draw(*leaf.shape).astype(leaf.dtype) if leaf.ndim else leaf + step, optimizer)
  return TrainState(jnp.int32(step), params, {'bias_LE': draw(2, 4), 'momentum_LE': draw(2, 4)}, optimizer)


def like(**settings):
  state = made(0, **settings)
  return abstract_like(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def write(path, *steps, keep=2, **settings):
  checkpoints = Checkpoints(path, keep)
  for step in steps:
    checkpoints.save(made(step, **settings), META | {'step': step, 'data': {'next_batch': step, 'epoch': step / 7}})
  checkpoints.wait()
  checkpoints.close()
  return path / 'checkpoints'


def newest(folder, **settings):
  """What a run there resumes from."""
  checkpoints = Checkpoints(folder.parent, 2)
  try:
    return checkpoints.restore_newest(like(**settings))
  finally:
    checkpoints.close()


def equal(found, expected):
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def files(folder):
  return sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())


def flip(file, at=0.5):
  """Turns one bit of a file."""
  content = bytearray(file.read_bytes())
  content[int(at * len(content))] ^= 4
  file.write_bytes(content)


def without_digests(step):
  """Makes of a checkpoint one of an earlier version."""
  (step / digests.FILE).unlink()
  meta = json.loads((step / 'meta/metadata').read_text())
  del meta['digests']
  (step / 'meta/metadata').write_text(json.dumps(meta))
