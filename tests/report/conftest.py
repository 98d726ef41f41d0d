import pytest

from moe.report import figures


@pytest.fixture
def words_only(monkeypatch):
  """Figures are drawn, but not rendered, which takes seconds: for tests that read what a page says."""
  monkeypatch.setattr(figures, 'to_svg', lambda figure: b'')
  monkeypatch.setattr(figures, 'save', lambda figure, path: None)
