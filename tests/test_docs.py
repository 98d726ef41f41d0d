"""The documentation names what there is: links, files, scripts."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), ROOT / 'experiments/LOG.md'])
FOLDERS = '(?:moe|configs|experiments|notebooks|tests|docs|constraints)'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files(page):
  text = page.read_text()
  links = re.findall(r'\]\((?!https?:|#)([^)#]+)', text)
  missing = [link for link in links if not (page.parent / link).exists()]
  if page.name not in ('LOG.md', 'CHANGELOG.md'):  # dated: what was there then
    named = re.findall(rf'(?<![\w./-])({FOLDERS}/[\w./]*\.(?:py|txt|md|json|csv|png|ipynb))', text)
    made = re.findall(r'New file `([^`]+)`', text)  # by who reads docs/howto
    missing += [name for name in named if 'NAME' not in name and name not in made and not (ROOT / name).exists()]
  assert not missing


def test_the_reference_is_of_what_there_is():
  """mkdocs says so, too, but is not installed where the tests run."""
  pages = [page.read_text() for page in ROOT.glob('docs/reference/*.md')]
  names = re.findall(r'^::: ([\w.]+)$', '\n'.join(pages), re.MULTILINE)
  assert len(names) > 20
  for name in names:
    module, _, last = name.rpartition('.')
    assert hasattr(importlib.import_module(module), last) or importlib.util.find_spec(name), name


def test_readme_is_short():
  """A claim, a picture within the first screen, two commands, a map; the rest is in docs/."""
  text = (ROOT / 'README.md').read_text()
  assert len(text.encode()) <= 10_000
  assert text[: text.index('![')].count('\n') < 20
