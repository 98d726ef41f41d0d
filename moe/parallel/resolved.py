"""A config as the code inside a step takes it: nothing is 'auto' any more, and the mesh's axes have names."""

import dataclasses
from typing import NamedTuple

from moe.config import Config
from moe.parallel.mesh import BATCH_AXES


class Axes(NamedTuple):
  """Names of the mesh axes by what they divide; () and None where nothing does, as without a mesh.

  batch: over which tokens are sharded, the expert axis among them. expert: over which the experts are. tensor: over
  which their hidden width is.
  """

  batch: tuple[str, ...] = BATCH_AXES
  expert: str | None = 'expert'
  tensor: str | None = 'tensor'


AXES = Axes()  # of our own meshes


@dataclasses.dataclass(frozen=True)
class Resolved(Config):
  """A `Config` whose dispatch and grouped_matmul are names of backends (made by `moe.model.resolve`).

  row_multiple: what every expert's rows are padded to. dropless: the capacity factor is ignored, as in evaluation and
  generation. each_token: the forward pass also returns what each token was given by each router, and what it cost.
  """

  axes: Axes = AXES
  row_multiple: int = 1
  dropless: bool = False
  each_token: bool = False

  @classmethod
  def of(cls, config: Config, **fields) -> 'Resolved':
    """`config` with these fields."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | fields)
