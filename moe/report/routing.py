"""The routing of a text as HTML without script: its tokens in the colour of their expert, layer by layer."""

from collections import Counter
from html import escape

import numpy as np

from moe.report.experts import Text

MOST_LAYERS = 16  # that can be chosen
MOST_NAMED = 10  # experts under the text
BETWEEN_HUES = 137.508  # degrees, the golden angle: neighbours look different, however many there are
STYLE = """
.routes { position: relative; margin: 0 0 1rem }
.routes input { position: absolute; opacity: 0 }
.routes label { display: inline-block; padding: .15rem .6rem; margin: 0 .2rem .4rem 0; border: 1px solid var(--line);
  border-radius: 999px; cursor: pointer; font-size: .88rem }
.routes div { display: none }
.routes pre span, .routes p span { color: #1f2328; border-radius: 3px; box-shadow: inset 0 0 0 1px #0001 }
.routes p span { padding: 0 .4rem; margin-right: .3rem; font-size: .85rem; white-space: nowrap; display: inline-block }
.routes pre .none { background: none; color: var(--muted) }
"""


def routed_text(text: Text, layers: list[str]) -> str:
  """The text once per layer, of which one is shown; all of it is escaped.

  Args:
    layers: names of the rows of text.expert_LTK.
  """
  picks = spread(len(layers), MOST_LAYERS)
  shown = ', '.join(f'#layer{i}:checked ~ #text{i}' for i in picks)
  chosen = ', '.join(f'#layer{i}:checked + label' for i in picks)
  focused = ', '.join(f'#layer{i}:focus-visible + label' for i in picks)
  rules = f'{shown} {{ display: block }} {chosen} {{ background: #1f6feb; color: #fff }} '
  rules += f'{focused} {{ outline: 2px solid #1f6feb; outline-offset: 2px }}'
  buttons = ''.join(
    f'<input type="radio" name="layer" id="layer{i}"{" checked" * (i == picks[0])}>'
    f'<label for="layer{i}">{escape(layers[i])}</label>'
    for i in picks
  )
  texts = '\n'.join(
    f'<div id="text{i}"><pre>{_tokens(text, i)}</pre><p class="muted">{_named(text, i)}</p></div>' for i in picks
  )
  return f'<style>{STYLE}{rules}</style>\n<section class="routes">{buttons}\n{texts}</section>'


def spread(count: int, most: int) -> list[int]:
  """At most `most` of 0..count-1, at equal distances, the first and the last among them."""
  return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def color(expert: int) -> str:
  """Light enough for dark letters; three lightnesses, as hues alone do not tell many experts apart."""
  return f'hsl({expert * BETWEEN_HUES % 360:.0f} 75% {(82, 72, 88)[expert % 3]}%)'


def _first(text, layer):
  """The expert that weighs most, per token."""
  best = text.weight_LTK[layer].argmax(-1)[:, None]
  return np.take_along_axis(text.expert_LTK[layer], best, -1)[:, 0].tolist()


def _tokens(text, layer):
  spans = []
  for place, expert in enumerate(_first(text, layer)):
    shown = _shown(text.texts[place])
    what = f'token {text.token_ids[place]}'
    if expert < 0:
      spans.append(f'<span class="none" title="{what}: not routed">{shown}</span>')
      continue
    order = np.argsort(-text.weight_LTK[layer, place], kind='stable')
    pairs = zip(text.expert_LTK[layer, place, order], text.weight_LTK[layer, place, order], strict=True)
    given = ', '.join(f'expert {one} ({weight:.2f})' for one, weight in pairs)
    spans.append(f'<span style="background:{color(expert)}" title="{what}: {given}">{shown}</span>')
  return ''.join(spans)


def _shown(piece: str) -> str:
  """What a token adds to the text, in a form that can be pointed at: a dot where that is nothing, marks for blanks."""
  visible = ''.join(char if char.isprintable() or char in '\n\t' else '\N{REPLACEMENT CHARACTER}' for char in piece)
  return escape(visible).replace('\t', '→\t').replace('\n', '↵\n') or '·'


def _named(text, layer):
  """The experts that weigh most for most tokens, with their share of them."""
  counts = Counter(expert for expert in _first(text, layer) if expert >= 0)
  total = max(1, counts.total())
  chips = [
    f'<span style="background:{color(expert)}">expert {expert} · {count / total:.0%}</span>'
    for expert, count in sorted(counts.most_common(MOST_NAMED), key=lambda pair: (-pair[1], pair[0]))
  ]
  rest = len(counts) - len(chips)
  return ''.join(chips) + (f'and {rest} more' if rest else '')
