"""Every notebook runs from top to bottom as it stands, and is kept with its outputs."""

from pathlib import Path

import pytest
from processes import environment

NEEDS = "needs the extra of the notebooks: pip install -e '.[notebooks]'"
nbclient = pytest.importorskip('nbclient', reason=NEEDS)
nbformat = pytest.importorskip('nbformat', reason=NEEDS)
pytest.importorskip('ipykernel', reason=NEEDS)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))

READ_ONLY = ('05_reading_an_ablation',)  # what they print depends on files of the repository only
SHORTER = {'02_balance_over_training': ("'train.steps': 300", "'train.steps': 20")}  # in the tests


def printed(notebook):
  """What the cells wrote, cell by cell."""
  return [''.join(o.text for o in cell.get('outputs', ()) if o.output_type == 'stream') for cell in notebook.cells]


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::PendingDeprecationWarning')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch, tmp_path):
  for name, value in environment().items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  notebook = nbformat.read(path, 4)
  for cell in notebook.cells if path.stem in SHORTER else ():
    cell.source = cell.source.replace(*SHORTER[path.stem])
  client = nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(path.parent)}})
  kept = printed(notebook)
  client.execute()  # raises at the first cell that fails
  if path.stem in READ_ONLY:
    assert printed(notebook) == kept, 'what it reads has changed: run it again'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept(path):
  cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code']
  outputs = [output for cell in cells for output in cell.outputs]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), 'run from top to bottom'
  assert outputs
  assert not [output for output in outputs if output.output_type == 'error' or output.get('name') == 'stderr']
