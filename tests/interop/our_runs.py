"""Run directories with a checkpoint of random numbers, without training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from moe.checkpoint import Checkpoints, flatten
from moe.model import transformer
from moe.state import TrainState


def random_arrays(config, std=1.0):
  """Parameters and router bias by dotted path, the vocabulary's padding 0, bias and norms' scales above 0."""
  rng, arrays = np.random.default_rng(0), {}
  for name, leaf in flatten(transformer.abstract_params(config)).items():
    value = std * rng.normal(size=leaf.shape)
    arrays[name] = (np.exp(value) if 'scale' in name else value).astype(np.float32)
  arrays['w_embedding_VD'][config.model.vocab_size :] = 0
  if 'w_head_DV' in arrays:
    arrays['w_head_DV'][:, config.model.vocab_size :] = 0
  bias_shape = (config.model.num_routers, config.model.num_experts)
  return arrays | {'bias_LE': rng.uniform(0, 0.3, bias_shape).astype(np.float32)}


def nested(config, arrays):
  """The model's parameters out of `arrays`, as the nested dict that `transformer.build` takes."""
  abstract = transformer.abstract_params(config)
  return jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(arrays[name]) for name in flatten(abstract)])


def make_run(path, config, arrays, step=7):
  """A run directory with one checkpoint of these arrays."""
  balance = {'bias_LE': jnp.asarray(arrays['bias_LE'])}
  checkpoints = Checkpoints(path)
  checkpoints.save(TrainState(jnp.asarray(step), nested(config, arrays), balance, ()), {'step': step, 'tokens': 0})
  checkpoints.wait()
  checkpoints.close()
  (path / 'config.json').write_text(json.dumps({'config': dataclasses.asdict(config)}))
  return path
