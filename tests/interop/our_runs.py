"""Run directories with a checkpoint of random numbers, without training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from moe.interop import load
from moe.model import transformer
from moe.train.checkpoint import Checkpoints, flatten, restore_weights
from moe.train.state import TrainState


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


def read_run(path, config):
  """The arrays of a run's newest checkpoint by dotted path, and its step."""
  abstract = transformer.abstract_params(config)
  bias = jax.ShapeDtypeStruct((config.model.num_routers, config.model.num_experts), np.float32)
  like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (abstract, {'bias_LE': bias}))
  restored, meta, _ = restore_weights(path, TrainState((), *like, ()))
  arrays = flatten(restored.params) | {'bias_LE': restored.balance['bias_LE']}
  return {name: np.asarray(array) for name, array in arrays.items()}, meta['step']


def read_hf(folder, mesh, dtype='float32', quantized=False):
  """Arrays of a checkpoint in Hugging Face's format by dotted path, on a mesh as the forward pass lays them out."""
  checkpoint = load.open_checkpoint(folder)
  specs = load.specs(checkpoint.model, mesh)
  params, bias_LE = load.load(checkpoint, mesh, specs, dtype, quantized)
  return checkpoint.model, params, bias_LE


def make_run(path, config, arrays, step=7, balance=()):
  """A run directory with one checkpoint of these arrays and what else its bias rule remembers."""
  balance = {'bias_LE': jnp.asarray(arrays['bias_LE']), **dict(balance)}
  checkpoints = Checkpoints(path)
  checkpoints.save(TrainState(jnp.asarray(step), nested(config, arrays), balance, ()), {'step': step, 'tokens': 0})
  checkpoints.wait()
  checkpoints.close()
  (path / 'config.json').write_text(json.dumps({'config': dataclasses.asdict(config)}))
  return path
