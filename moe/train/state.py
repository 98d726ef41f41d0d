"""The training state, where each part of it lives, and its creation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.balance import rules
from moe.config import Config
from moe.model import transformer
from moe.parallel import sharding
from moe.train.optimizer import make_optimizer


class TrainState(NamedTuple):
  """Everything a step reads and writes.

  step: int32 optimizer steps done. params: nested dict of fp32 masters. balance: the bias rule's state, 'bias_LE' and
  more. opt_state: optax state (moments).
  """

  step: jax.Array
  params: dict
  balance: dict
  opt_state: Any


class Weights(NamedTuple):
  """What evaluation and generation read of a state, by the same names."""

  params: dict
  balance: dict


def create(config: Config, mesh) -> TrainState:
  """A fresh state on `mesh`; the same values on every mesh for the same config.train.seed."""
  # A program of many random draws takes XLA:CPU three times as long to optimise as to run unoptimised.
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  options = {'xla_backend_optimization_level': 0} if on_cpu else None
  return jax.jit(lambda: _fresh(config), out_shardings=shardings(config, mesh), compiler_options=options)()


def abstract(config: Config) -> TrainState:
  """Shapes and dtypes of the state; nothing is allocated."""
  return jax.eval_shape(lambda: _fresh(config))


def shardings(config: Config, mesh) -> TrainState:
  """The NamedSharding of each leaf: masters and moments as `sharding.place` stores them, the rest replicated."""
  state = abstract(config)
  stored = {_path(path): spec.stored for path, spec in _flat(sharding.place_tree(state.params, mesh))}

  def spec(path, leaf):
    # A moment's path ends with its parameter's: (..., 'mu', 'layers', 'experts', 'w_up_eDF').
    keys = _path(path)
    return next((stored[keys[i:]] for i in range(len(keys)) if keys[i:] in stored), P())

  return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), state)


def count_parameters(config: Config) -> tuple[int, int]:
  """Parameters in all (vocabulary unpadded, router bias aside) and those a token's forward pass uses.

  Active ones leave out the embedding lookup and count top_k of the routed experts. MTP modules count in both.
  """
  model, total, active = config.model, 0, 0
  for path, leaf in _flat(transformer.abstract_params(config)):
    name, size = path[-1].key, leaf.size
    if 'V' in name.rsplit('_', 1)[-1]:
      size = size // model.padded_vocab * model.vocab_size
    total += size
    if name == 'w_embedding_VD' and not model.tie_embeddings:
      continue
    active += size * model.top_k // model.num_experts if 'e' in name.rsplit('_', 1)[-1] else size
  return total, active


def _fresh(config: Config) -> TrainState:
  params = transformer.init_params(config, jax.random.key(config.train.seed))
  balance = rules.init(config.balance, config.model.num_routers, config.model.num_experts)
  optimizer = make_optimizer(config.optimizer, config.train.steps)
  return TrainState(jnp.zeros((), jnp.int32), params, balance, optimizer.init(params))


def _path(path) -> tuple:
  return tuple(key.key for key in path if hasattr(key, 'key'))


def _flat(tree):
  is_leaf = lambda node: isinstance(node, sharding.Placement)
  return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
