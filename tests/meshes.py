"""Meshes over the virtual devices."""

import functools
import math

import jax

from moe.parallel.mesh import AXES


@functools.cache
def mesh_of(pipe=1, data=1, expert=1, tensor=1):
  """A mesh of these axes over the first devices."""
  shape = pipe, data, expert, tensor
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4, devices=devices)
