"""Packaging of moe-lossfree; tool settings are in pyproject.toml."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HOME = pathlib.Path(__file__).parent
DOCS = (HOME / 'docs/requirements.txt').read_text('utf-8').split()
LINT = ['ruff>=0.6', 'mypy>=2.4', 'types-tqdm']
TEST = ['pytest>=8', 'pytest-xdist', *LINT, 'pyarrow', 'jinja2', 'nbclient', 'ipykernel', 'pyyaml']


class BuildWithConfigs(build_py):
  """Puts configs/, which is beside moe/ in a checkout, into the package."""

  def run(self):
    super().run()
    if not self.editable_mode:
      ignore = shutil.ignore_patterns('__pycache__')
      shutil.copytree(HOME / 'configs', pathlib.Path(self.build_lib) / 'moe/configs', ignore=ignore, dirs_exist_ok=True)


setup(
  name='moe-lossfree',
  version=re.search(r"^__version__ = '(.*)'", (HOME / 'moe/__init__.py').read_text('utf-8'), re.MULTILINE)[1],
  description='Loss-free balanced mixture-of-experts language models in JAX',
  long_description=(HOME / 'README.md').read_text('utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['moe', 'moe.*']),
  package_data={'moe': ['py.typed']},
  cmdclass={'build_py': BuildWithConfigs},
  entry_points={'console_scripts': ['moe = moe.commands:main']},
  install_requires=[
    'jax>=0.10.2',
    'flax>=0.12',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'tensorstore>=0.1.60',  # Orbax's files, a slice at a time
    'ml-collections>=1.0',
    'absl-py>=2.1',
    'numpy>=2.0',
    'scipy>=1.13',  # significance in the reports of sweeps
    'grain>=0.2.10',  # batches
    'tokenizers>=0.20',  # BPE and tokenizer.json
    'safetensors>=0.8',  # F8_E8M0; Hugging Face interchange
    'tqdm>=4.66',  # progress
    'tensorboardX>=2.6',  # TensorBoard events without TensorFlow
    'matplotlib>=3.9',  # report
  ],
  extras_require={
    'cuda12': ['jax[cuda12]>=0.10.2'],
    'cuda13': ['jax[cuda13]>=0.10.2'],
    'tpu': ['jax[tpu]>=0.10.2'],
    'parquet': ['pyarrow'],
    'chat': ['jinja2>=3.1.6'],  # generate.py --chat; older ones have holes in their sandbox
    'ray': ['ray>=2.40'],  # sweeps over a cluster
    'notebooks': ['jupyterlab', 'ipykernel'],
    'docs': DOCS,
    'test': TEST,
  },
)
