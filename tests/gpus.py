"""Programs lowered for GPUs that are not here."""

import jax

from moe.parallel.mesh import abstract_mesh


def lower_for_gpu(function, *args, shape=(1, 1, 1, 1)):
  """The jitted `function` of the arguments (or of their shapes), lowered for Hopper GPUs.

  A kernel asks the mesh around it for which GPU it is to be: if there is a shard_map inside, `shape` is its mesh's.
  """
  with jax.sharding.use_abstract_mesh(abstract_mesh(shape)):
    return function.trace(*args).lower(lowering_platforms=('cuda',))
