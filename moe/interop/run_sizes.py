"""Whether a run's config.json can be that of its checkpoint, asked before a model of that size is made.

Other sizes are shapes, compared with the checkpoint's when it is opened; but of dense layers and MTP modules each has
arrays of its own, and a million of them, from a damaged config.json, would take minutes and gigabytes to list.
"""

from pathlib import Path

from moe.config import ModelConfig
from moe.errors import UserError, short
from moe.files import read_json
from moe.train.saved import Newest


def check_layers(run: Path, model: ModelConfig) -> None:
  """Compares the layers that are not stacked with the names in the run's newest checkpoint.

  Raises:
    UserError: there is none, it holds fewer, or its list of arrays is damaged.
  """
  newest = Newest(run)  # which a training that goes on does not delete meanwhile
  file = newest.path / 'params' / '_METADATA'  # Orbax's list of the arrays
  arrays = read_json(file).get('tree_metadata')
  if not isinstance(arrays, dict):
    raise UserError(f'checkpoint {file} is damaged: its tree_metadata is {short(arrays)}')
  names = [name.strip("()',") for name in arrays]  # each is written as a tuple of one text
  for field, prefix in (('num_dense_layers', 'dense_layers'), ('mtp_depth', 'mtp')):
    held = len({name.split('.')[1] for name in names if name.startswith(f'{prefix}.')})
    if getattr(model, field) > held:
      raise UserError(
        f'{run / "config.json"} has model.{field} = {getattr(model, field)}, and the checkpoint of step {newest.step} '
        f'holds {held}: it does not fit the model'
      )
