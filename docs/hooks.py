"""Makes mkdocs see the repository as GitHub shows it: each page under its own path, and the files that pages link to.

So a link such as ../configs/tiny.py is right in both, and a strict build finds those that are not.
"""

import pathlib
import re

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ('*.md', 'docs/**/*.md', 'experiments/LOG.md')
LINK = re.compile(r'\]\((?!https?:|#)([^)#]+)')


def on_files(files, config):
  pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
  linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text('utf-8'))}
  paths = sorted(path.relative_to(ROOT).as_posix() for path in pages | linked if path.is_file())
  of_theme = [file for file in files if not pathlib.Path(file.abs_src_path or '/').is_relative_to(config.docs_dir)]
  ours = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
  return Files([*of_theme, *ours])
