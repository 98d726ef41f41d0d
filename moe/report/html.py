"""Lays a run out as one self-contained HTML page: no script, no external resource, light and dark."""

import base64
import json
from html import escape
from typing import TYPE_CHECKING, Any

from moe.report import figures

if TYPE_CHECKING:
  from moe.report.run import Run

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
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem }
table { width: 100%; border-collapse: collapse; font-size: .93rem }
th { text-align: left; font-weight: 400; color: var(--muted); padding: .2rem .8rem .2rem 0; vertical-align: top }
td { text-align: right; padding: .2rem 0; overflow-wrap: anywhere }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums }
tr + tr > * { border-top: 1px solid var(--line) }
pre { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 36rem; overflow-y: auto }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0 }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(run: 'Run', summary: dict[str, Any]) -> str:
  """The report of `run` as an HTML document.

  Args:
    run: the run, from `moe.report.run.load_run`.
    summary: what `moe.report.run.summarize` makes of it.
  """
  body = [
    f'<h1>{escape(summary["run"])}</h1>',
    f'<p class="muted">{_state(summary["steps"], run.setting("train.steps"), summary["finished"])}</p>',
    f'<p class="verdict">{escape(verdict(summary))}</p>',
    _tables(run, summary),
    '<div class="grid">',
    _section('Loss', _LOSS, _image('Loss by step', figures.loss(run)), 'No finite training loss was logged.'),
    _section('Balance over training', _VIO, _image('MaxVio by step', figures.max_vio(run)), _NO_LOADS),
    '</div>',
    _section('Load by layer and expert', _HEAT, _grid(figures.heat_maps(run)), _NO_LOADS),
    '<div class="grid">',
    _section('Throughput', _SPEED, _image('Tokens per second by step', figures.throughput(run)), _NO_SPEED),
    _section('Dropped tokens', _DROPS, _image('Drop rate by step', figures.drop_rate(run)), _no_drops(run)),
    '</div>',
    _section('Router health', _HEALTH, _grid(figures.health(run)), 'No router statistics were logged.'),
    _section('Generated sample', '', _sample(run.sample), 'No sample was generated.'),
    '<h2>Set-up</h2>',
    _details('Command', run.info.get('command')),
    _details('Versions', summary['versions']),
    _details('Complete config', run.info['config']),
  ]
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f'<title>{escape(summary["run"])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
    + '\n'.join(body)
    + '\n</main>\n</body>\n</html>\n'
  )


def verdict(summary: dict[str, Any]) -> str:
  """One line: validation bits per byte against the baselines, MaxVio_global against random balanced routing."""
  bits, vio, floor = summary['val_bits_per_byte'], summary['max_vio_global'], summary['max_vio_noise_floor']
  parts = []
  if bits is not None:
    baselines = [_against(bits, summary[f'{name}_bits_per_byte'], name) for name in ('trigram', 'gzip')]
    parts.append(', '.join([f'{bits:.3f} bits per byte on validation text', *filter(None, baselines)]) + '.')
  if vio is not None and floor:
    parts.append(f'MaxVio_global {vio:.3g}, {vio / floor:.1f} times the {floor:.3g} of random balanced routing.')
  elif vio is not None:
    parts.append(f'MaxVio_global {vio:.3g}.')
  return ' '.join(parts) or 'Not evaluated: the run stopped before its first evaluation.'


_LOSS = (
  'Cross-entropy of the next token: each training batch faint, its running mean bold. Horizontal lines: a trigram '
  'model and gzip on the validation text.'
)
_VIO = (
  'MaxVio = (load of the busiest expert - mean) / mean in one training batch, per layer. Dashed: the expected MaxVio '
  'of a random router without any preference on as many tokens.'
)
_HEAT = 'Tokens of an expert / mean of its layer: white is balanced, blue is idle, red is overloaded (2 or more).'
_DROPS = "Token copies beyond their expert's capacity, as a share of all token copies."
_SPEED = 'Training tokens per second; the dashed line is the median.'
_NO_LOADS = 'No expert loads were logged.'
_NO_SPEED = 'No throughput was logged.'
_HEALTH = 'Spread of the routing bias over all experts and layers, and the optimizer around it.'


def _state(steps, planned, finished):
  if steps < planned:
    return f'Interrupted after {steps:,} of {planned:,} steps.'
  return f'Finished {steps:,} steps.' if finished else f'All {steps:,} steps done, but no final evaluation.'


def _against(bits, baseline, name):
  if not baseline:
    return None
  change = bits / baseline - 1
  return f'{abs(change):.0%} {"less" if change < 0 else "more"} than {name} ({baseline:.3f})'


def _no_drops(run):
  logged = len(run.series('drop_rate')[0])
  return 'No token was dropped in any logged step.' if logged else 'The drop rate was not logged.'


def _section(title, text, content, otherwise):
  """A heading and its content, or the one-line statement `otherwise` where there is none."""
  if not content:
    return f'<section><h2>{title}</h2>\n<p class="muted">{escape(otherwise)}</p></section>'
  caption = f'<p class="muted">{escape(text)}</p>\n' if text else ''
  return f'<section><h2>{title}</h2>\n{caption}{content}</section>'


def _image(description, figure, title=''):
  if figure is None:
    return ''
  source = 'data:image/svg+xml;base64,' + base64.b64encode(figures.to_svg(figure)).decode()
  caption = f'<figcaption>{escape(title)}</figcaption>' if title else ''
  return f'<figure>{caption}<img alt="{escape(description)}" src="{source}"></figure>'


def _grid(titled_figures):
  cards = '\n'.join(_image(title, figure, title) for title, figure in titled_figures)
  return f'<div class="grid">\n{cards}\n</div>' if cards else ''


def _sample(text):
  return '' if text is None else f'<pre>{escape(text)}</pre>'


def _details(title, value):
  text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
  return f'<details><summary>{title}</summary>\n<pre>{escape(text)}</pre>\n</details>'


def _tables(run, summary):
  s = summary
  groups = {
    'Quality': [
      ('validation bits per byte', s['val_bits_per_byte']),
      ('trigram bits per byte', s['trigram_bits_per_byte']),
      ('gzip bits per byte', s['gzip_bits_per_byte']),
      ('validation loss, nats per token', s['val_loss']),
      ('validation perplexity', s['val_perplexity']),
      ('training loss, last 20 rows', s['train_loss_last_20_rows']),
    ],
    'Balance': [
      ('MaxVio_global', s['max_vio_global']),
      ('MaxVio of random routing', s['max_vio_noise_floor']),
      ('load CV, global', s['cv_global']),
      ('load entropy, global', s['load_entropy_global']),
      ('MaxVio_batch, last 10%', s['max_vio_batch']),
      ('drop rate, last 10%', s['drop_rate']),
    ],
    'Cost': [
      ('parameters', s['parameters']),
      ('active per token', s['active_parameters']),
      ('training tokens', s['tokens']),
      ('tokens / s, median', s['tokens_per_s'] and round(s['tokens_per_s'])),
      *([('MFU, median', f'{s["mfu"]:.1%}')] if s['mfu'] else []),
      ('model TFLOP / s, median', s['model_tflop_per_s']),
      ('training time', _duration(s['train_s'])),
      ('device', s['device']),
    ],
    'Set-up': [
      ('bias rule', s['bias_rule']),
      ('gamma', s['gamma']),
      ('auxiliary loss', s['aux_loss']),
      ('seed', s['seed']),
      ('mesh', s['mesh']),
      ('corpus', s['corpus']),
      ('training / validation bytes', f'{_text(s["train_bytes"])} / {_text(s["val_bytes"])}'),
    ],
  }
  return '<div class="grid small">\n' + '\n'.join(_table(title, rows) for title, rows in groups.items()) + '\n</div>'


def _table(title, rows):
  cells = '\n'.join(f'<tr><th scope="row">{name}</th>{_cell(value)}</tr>' for name, value in rows)
  return f'<section class="card"><h3>{title}</h3><table>\n{cells}\n</table></section>'


def _cell(value):
  kind = ' class="number"' if isinstance(value, int | float) else ''
  return f'<td{kind}>{escape(_text(value))}</td>'


def _text(value):
  if value is None:
    return '–'
  if isinstance(value, float):
    return f'{value:.4g}'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _duration(seconds):
  if seconds is None:
    return None
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02} min' if hours else f'{minutes} min {seconds:02} s'
