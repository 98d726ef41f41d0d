"""What several files of tests share: checkpoints to copy and damage."""

import shutil

import pytest
from checkpoints import write


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A run with checkpoints of steps 8 and 12, to copy and damage."""
  return write(tmp_path_factory.mktemp('checkpoints'), 8, 12)


@pytest.fixture
def copied(two, tmp_path):
  """Checkpoints of `two`, in a run directory of the test's own."""
  return shutil.copytree(two, tmp_path / 'run' / 'checkpoints')
