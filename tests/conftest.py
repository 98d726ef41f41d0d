"""What the tests share: 16 virtual CPU devices, a cache of compiled programs, meshes and a tiny model.

Device count, platform and matmul precision must be set before the first array exists, so they are set on import.
Nearly all the time goes into tracing and compiling: programs are compiled unoptimised, also by the processes that tests
start, and Python looks for garbage seldom, since traced programs are many objects that stay.
"""

import gc
import os
from pathlib import Path

import jax
import meshes
import pytest
from flax import nnx

from moe.config import ModelConfig

DEVICES = 16
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'moe-lossfree' / 'tests-xla'

gc.set_threshold(200_000, 20, 100)
QUICK = ['--xla_backend_optimization_level=0', '--xla_llvm_disable_expensive_passes=true']
if jax.__version_info__ < (0, 11):  # later versions know no such flag, and XLA ends at one that it does not know
  QUICK.append('--xla_cpu_use_fusion_emitters=false')  # with them, compiling takes twice as long
os.environ['XLA_FLAGS'] = ' '.join(QUICK)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', DEVICES)
jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_compilation_cache_dir', os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
# Of these, a file takes a minute or more. They begin, so that none is left for one worker while the other idles.
LONG = (
  'train/test_train.py', 'test_lowering.py', 'inference/test_generate.py', 'commands/test_generate_cli.py',
  'sweep/test_ablate.py', 'train/test_train_again.py', 'test_notebooks.py', 'bench/test_bench.py',
  'train/test_step_mesh.py', 'train/test_pipelined.py', 'train/test_step.py', 'test_fuzz.py',
)  # fmt: skip


def pytest_configure(config):
  config.option.loadscopereorder = False  # xdist would begin with the files of many tests, which are quick ones


def pytest_collection_modifyitems(items):
  place = {Path(__file__).parent / name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(scope='session')
def mesh_of():
  """mesh_of(pipe=1, data=1, expert=1, tensor=1): a mesh over that many of the virtual devices."""
  return meshes.mesh_of


@pytest.fixture(scope='module')
def unrendered():
  """Figures of reports are drawn, but not rendered: that would take half as long as the training of a tiny run."""
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr('moe.report.figures.to_svg', lambda figure: b'')
    yield


@pytest.fixture(scope='session')
def tiny_model():
  """Every feature of the model switched on, in the smallest sizes that still tell the axes apart."""
  return ModelConfig(
    vocab_size=40,
    d_model=16,
    num_layers=3,
    num_dense_layers=1,
    d_ff=12,
    d_expert=6,
    num_experts=8,
    top_k=3,
    num_groups=4,
    top_groups=2,
    route_scale=1.5,
    num_heads=2,
    q_lora_rank=7,
    kv_lora_rank=9,
    qk_nope_dim=5,
    qk_rope_dim=4,
    v_dim=3,
    yarn_factor=4.0,
    yarn_original_len=64,
    mtp_depth=2,
  )


@pytest.fixture(scope='session')
def module_of():
  """module_of(make, params): the NNX module that `make()` declares, holding the pure dict `params` of any shapes."""

  def module_of(make, params):
    graph, state = nnx.split(nnx.eval_shape(make))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)

  return module_of
