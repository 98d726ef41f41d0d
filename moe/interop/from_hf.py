"""A DeepSeek-V3 checkpoint in Hugging Face's format as a run directory."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import Config
from moe.data import folder_tokens
from moe.data.tokenizer import library_errors, load_saved
from moe.errors import UserError
from moe.files import write_atomically
from moe.files.folder import new_folder
from moe.interop.load import Checkpoint, load, open_checkpoint, specs
from moe.parallel.mesh import make_mesh, setup_devices
from moe.train import run_dir
from moe.train.checkpoint import Checkpoints
from moe.train.state import TrainState


def import_run(source: Path, run: Path, config: Config | None = None) -> list[str]:
  """Makes the run directory `run` from the checkpoint in `source`. Returns lines for the user.

  The run has weights and router bias at step 0 and no moments: `train.init_from` starts from it, `config.py` in it
  holds the model's settings. If it is killed, the same call goes on; a checkpoint that was whole is not made again.

  Args:
    config: its mesh and train.batch_size; the float32 weights lie on that mesh, as in training. With mesh.cpu_devices,
      call this before JAX is first used.

  Raises:
    UserError: `run` exists, disk full, several processes, or anything that `open_checkpoint` and `make_mesh` refuse.
  """
  config = config or Config()
  if config.mesh.num_processes > 1:
    raise UserError(f'config mesh.num_processes = {config.mesh.num_processes} must be 1: one process imports')
  setup_devices(config.mesh)
  checkpoint = open_checkpoint(source)
  mesh = make_mesh(dataclasses.replace(config, model=checkpoint.model))
  lines, tokenizer = list(checkpoint.remarks), _tokenizer(checkpoint)
  if tokenizer is None:
    lines.append(f'no tokenizer.json in {source}; set data.tokenizer')
  else:
    lines += load_saved(tokenizer).remarks
  settings = Config(model=checkpoint.model)
  with new_folder(run, _plan(checkpoint)) as folder:
    folder_tokens.read(source).save(folder)
    if tokenizer is not None:
      shutil.copyfile(tokenizer, folder / 'tokenizer.json')
      path = str((run / 'tokenizer.json').absolute())
      settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, tokenizer=path))
    folder_tokens.seal(folder)
    _save(folder, checkpoint, mesh)
    run_dir.describe_run(folder, settings, mesh, run_dir.command_line())
    write_atomically(folder / 'config.py', _config_file(settings))
  arguments = f'--config={run}/config.py --config.train.init_from={run}'
  return [*lines, f'{run}: weights of {source}; train on with {arguments}']


def _plan(checkpoint: Checkpoint) -> dict:
  """What the run's weights follow from: settings and files, by size and time."""
  files = sorted({tensor.file for tensor in checkpoint.stored.values()})
  stats = {str(file.absolute()): file.stat() for file in files}
  found = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
  return {'model': dataclasses.asdict(checkpoint.model), 'files': found}


def _tokenizer(checkpoint: Checkpoint) -> Path | None:
  """The folder's tokenizer.json, if there is one. Raises UserError if it is none, or too large for the model."""
  file, vocabulary = checkpoint.folder / 'tokenizer.json', checkpoint.model.vocab_size
  if not file.is_file():
    return None
  with library_errors(UserError, f'cannot read {file}: '):
    ids = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
  if max(ids, default=0) >= vocabulary:
    raise UserError(f'{file} has a token {max(ids)} and the model a vocabulary of {vocabulary}: ids must be below that')
  return file


def _save(folder, checkpoint, mesh):
  """The checkpoint of step 0, unless a killed import has written all of it."""
  checkpoints = Checkpoints(folder)
  try:
    if checkpoints.latest() is None:
      params, bias_LE = load(checkpoint, mesh, specs(checkpoint.model, mesh, stored=True), 'float32')
      step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P()))
      checkpoints.save(TrainState(step, params, {'bias_LE': bias_LE}, ()), {'step': 0, 'tokens': 0})
      checkpoints.wait()
  finally:
    checkpoints.close()


def _config_file(config) -> str:
  """A file for --config with the imported model's settings."""
  model = ''.join(f'        {name}={value!r},\n' for name, value in dataclasses.asdict(config.model).items())
  return (
    '"""The model of an imported checkpoint; override what else a run needs."""\n\n'
    'from moe.config import Config, DataConfig, ModelConfig, to_config_dict\n\n\n'
    "def get_config(arg: str = ''):\n"
    '  return to_config_dict(\n'
    '    Config(\n'
    f'      model=ModelConfig(\n{model}      ),\n'
    f'      data=DataConfig(tokenizer={config.data.tokenizer!r}),\n'
    '    ),\n'
    '    arg,\n'
    '  )\n'
  )
