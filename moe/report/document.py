"""Pieces of a report page: self-contained HTML without script or external resource, light and dark."""

import base64
import json
from html import escape
from typing import Any

from matplotlib.figure import Figure

from moe.report import figures

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #57606a; --page: #f6f8fa; --card: #fff; --line: #d8dee4 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --muted: #9198a1; --page: #0d1117; --card: #161b22; --line: #30363d }
}
* { box-sizing: border-box }
body { margin: 0; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 4rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif }
main { max-width: 1240px; margin: 0 auto }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem }
h3 { font-size: 1rem; margin: 0 0 .4rem }
p { margin: 0 0 .7rem; max-width: 75ch }
.muted { color: var(--muted) }
.verdict { font-size: 1.1rem; margin: .8rem 0 1.2rem; padding: .7rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-left: 4px solid #1f6feb; border-radius: 8px; max-width: none }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)) }
.grid > section { min-width: 0 }
.grid.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; min-width: 0 }
figure { margin: 0; padding: clamp(.3rem, 1.5vw, .8rem); background: #fff; color: #1f2328; min-width: 0;
  border: 1px solid var(--line); border-radius: 8px }
figure img { display: block; width: 100%; max-width: 620px; margin: 0 auto; height: auto }
figure.wide { margin-bottom: 1rem }
figure.wide img { max-width: 1000px }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem }
table { width: 100%; border-collapse: collapse; font-size: .93rem }
th { text-align: left; font-weight: 400; color: var(--muted); padding: .2rem .8rem .2rem 0; vertical-align: top }
td { text-align: right; padding: .2rem 0; overflow-wrap: anywhere }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums }
tr + tr > * { border-top: 1px solid var(--line) }
pre { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 36rem; overflow-y: auto }
b { font-weight: 650 }
.card.wide { overflow-x: auto; margin-bottom: 1rem }
.matrix { font-size: .88rem }
.matrix th, .matrix td { padding: .2rem .45rem; white-space: nowrap; text-align: right }
.matrix th[scope^=col] { white-space: normal; vertical-align: bottom }
.matrix th[scope=colgroup] { text-align: center }
.matrix th:first-child { text-align: left; position: sticky; left: 0; background: var(--card) }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0 }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: list[str]) -> str:
  """A whole HTML document; `title` is escaped, the parts of `body` are HTML already."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
    + '\n'.join(body)
    + '\n</main>\n</body>\n</html>\n'
  )


def section(title: str, text: str, content: str, otherwise: str) -> str:
  """A heading and its content, or the one-line statement `otherwise` where there is none.

  Args:
    title: HTML.
    text: a caption, escaped here; '' for none.
    content: HTML.
    otherwise: a sentence, escaped here.
  """
  if not content:
    return f'<section><h2>{title}</h2>\n<p class="muted">{escape(otherwise)}</p></section>'
  caption = f'<p class="muted">{escape(text)}</p>\n' if text else ''
  return f'<section><h2>{title}</h2>\n{caption}{content}</section>'


def image(description: str, figure: Figure | None, title: str = '', wide: bool = False) -> str:
  """The figure as an inline SVG under its title, '' for none; `description` is read to those who cannot see it.

  Args:
    description, title: a few words each, escaped here; no title is ''.
    figure: None for nothing at all.
    wide: over the whole page, not a column of it.
  """
  if figure is None:
    return ''
  source = 'data:image/svg+xml;base64,' + base64.b64encode(figures.to_svg(figure)).decode()
  caption = f'<figcaption>{escape(title)}</figcaption>' if title else ''
  return f'<figure{" class=wide" if wide else ""}>{caption}<img alt="{escape(description)}" src="{source}"></figure>'


def grid(titled_figures: list[tuple[str, Figure]]) -> str:
  """The figures side by side as far as the page is wide; '' for no figures."""
  cards = '\n'.join(image(title, figure, title) for title, figure in titled_figures)
  return f'<div class="grid">\n{cards}\n</div>' if cards else ''


def details(title: str, value: Any) -> str:
  """Text, or a JSON value, that is folded away under its title."""
  content = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
  return f'<details><summary>{title}</summary>\n<pre>{escape(content)}</pre>\n</details>'


def table(title: str, rows: list[tuple[str, Any]]) -> str:
  """A card of (name, value) rows."""
  cells = '\n'.join(f'<tr><th scope="row">{name}</th>{cell(value)}</tr>' for name, value in rows)
  return f'<section class="card"><h3>{title}</h3><table>\n{cells}\n</table></section>'


def cell(value: Any) -> str:
  """A table cell: numbers stay on one line."""
  kind = ' class="number"' if isinstance(value, int | float) else ''
  return f'<td{kind}>{escape(text(value))}</td>'


def text(value: Any) -> str:
  """A value for people: 4 digits of a float, thousands of an integer, a dash for None."""
  if value is None:
    return '–'
  if isinstance(value, float):
    return f'{value:.4g}'
  return f'{value:,}' if isinstance(value, int) else str(value)
