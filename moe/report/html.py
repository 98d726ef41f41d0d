"""Lays a run out as one self-contained HTML page."""

import os
from html import escape
from typing import Any

from moe.files import write_atomically, write_json
from moe.report import expert_figures, figures
from moe.report.document import details, document, grid, image, section, table, text
from moe.report.expert_sections import balance_sections, text_sections, title_of
from moe.report.run import Run, load_run, summarize


def write_report(path: str | os.PathLike) -> dict[str, Any]:
  """Writes `report.html` and `summary.json` into run directory `path`, each in one move, and returns the summary.

  Raises:
    UserError: the directory cannot be read as a run (see `load_run`) or not be written to.
  """
  run = load_run(path)
  summary = summarize(run)
  write_atomically(run.path / 'report.html', page(run, summary))
  write_json(run.path / 'summary.json', summary)  # last: a sweep takes it for the sign that all is here
  return summary


def page(run: Run, summary: dict[str, Any]) -> str:
  """The report of `run` as an HTML document.

  Args:
    run: the run, from `moe.report.run.load_run`.
    summary: what `moe.report.run.summarize` makes of it.
  """
  body = [
    f'<h1>{escape(summary["run"])}</h1>',
    f'<p class="muted">{_state(summary["steps"], run.setting("train.steps"), summary["finished"])}</p>',
    f'<p class="verdict">{escape(verdict(summary))}</p>',
    *(f'<p>Missing rows: {escape(hole)}.</p>' for hole in run.holes),
    *(f'<p>Shown as it was logged: {escape(one)}.</p>' for one in run.missing_plugins),
    *(f'<p class="muted">{escape(sentence)}</p>' for sentence in remarks(run, summary)),
    _tables(run, summary),
    '<div class="grid">',
    section(
      'Loss',
      _LOSS + _SAMPLE * _is_sampled(run),
      image('Loss by step', figures.loss(run)),
      'No finite training loss was logged.',
    ),
    section('Balance over training', _VIO, image('MaxVio by step', figures.max_vio(run)), _NO_LOADS),
    '</div>',
    section('Load by layer and expert', _HEAT, grid(figures.heat_maps(run)), _NO_LOADS),
    *balance_sections(run),
    *text_sections(run),
    '<div class="grid">',
    section('Throughput', _SPEED, image('Tokens per second by step', figures.throughput(run)), _NO_SPEED),
    section('Dropped tokens', _DROPS, image('Drop rate by step', figures.drop_rate(run)), _no_drops(run)),
    '</div>',
    section('Training health', _HEALTH, grid(_health(run)), 'No statistics of routers and gradients were logged.'),
    section('Generated sample', '', _sample(run.sample), 'No sample was generated.'),
    '<h2>Set-up</h2>',
    details('Command', run.info.get('command')),
    details('Versions', summary['versions']),
    details('Starts', run.starts),
    details('Complete config', run.info['config']),
  ]
  return document(summary['run'], body)


def verdict(summary: dict[str, Any]) -> str:
  """One line: validation bits per byte against the baselines, MaxVio_global against random balanced routing."""
  bits, vio, floor = summary['val_bits_per_byte'], summary['max_vio_global'], summary['max_vio_noise_floor']
  parts = []
  if bits is not None:
    of = 'a sample of the validation text' if 'evaluated_on' in summary else 'validation text'
    lost = summary.get('tokenizer_loses')
    # What a tokenizer loses is not paid for: such a figure compares with nothing.
    baselines = [] if lost else [_against(bits, summary[f'{name}_bits_per_byte'], name) for name in ('trigram', 'gzip')]
    parts.append(', '.join([f'{bits:.3f} bits per byte on {of}', *filter(None, baselines)]) + '.')
    if lost:
      parts.append(f'The tokenizer loses text ({lost:.0%} of a sample), so the figure compares with no other.')
  if vio is not None and floor:
    parts.append(f'MaxVio_global {vio:.3g}, {vio / floor:.1f} times the {floor:.3g} of random balanced routing.')
  elif vio is not None:
    parts.append(f'MaxVio_global {vio:.3g}.')
  return ' '.join(parts) or 'Not evaluated: the run stopped before its first evaluation.'


def remarks(run: Run, summary: dict[str, Any]) -> list[str]:
  """Sentences on what puzzles in the numbers of this run, where it does."""
  found = []
  bits, gzip = summary['val_bits_per_byte'], summary['gzip_bits_per_byte']
  if bits is not None and gzip and bits > gzip:
    found.append(
      'More than gzip is usual after a short training: gzip packs the whole validation text and copies what it has '
      'seen up to 32 kB before; the model sees one sequence, and learned from other text.'
    )
  if _mtp_loss(run) is not None:
    found.append(
      'The loss of an MTP module may lie below that of the model: for the token that it predicts it, too, sees all '
      'tokens before, and it has one layer more.'
    )
  return found


def _mtp_loss(run):
  """Validation loss of the MTP modules in the last evaluation; None without them."""
  found = run.evals[-1].get('val_mtp_loss') if run.evals else None
  return found if isinstance(found, float) else None


_LOSS = (
  'Cross-entropy of the next token: each training batch faint, its running mean bold. Horizontal lines: a trigram '
  'model and gzip on the validation text.'
)
_SAMPLE = ' The points of a sample are of the same rows of the validation text at every step.'
_VIO = (
  'MaxVio = (load of the busiest expert - mean) / mean in one training batch, per layer. Dashed: the expected MaxVio '
  'of a random router without any preference on as many tokens.'
)
_HEAT = 'Tokens of an expert / mean of its layer: white is balanced, blue is idle, red is overloaded (2 or more).'
_DROPS = "Token copies beyond their expert's capacity, as a share of all token copies."
_SPEED = 'Training tokens per second; the dashed line is the median.'
_NO_LOADS = 'No expert loads were logged.'
_NO_SPEED = 'No throughput was logged.'
_HEALTH = 'Spread of the routing bias over all experts and layers, the optimizer around it, the loss of MTP modules.'


def _health(run):
  more = [('Gradient norm by group', expert_figures.gradient_norms(run)), ('MTP loss', expert_figures.mtp_loss(run))]
  return figures.health(run) + [pair for pair in more if pair[1]]


def _is_sampled(run):
  return any(row.get('set') == 'sample' for row in run.evals)


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


def _sample(text):
  return '' if text is None else f'<pre>{escape(text)}</pre>'


def _tables(run, summary):
  s, mtp_loss = summary, _mtp_loss(run)
  groups = {
    'Quality': [
      ('validation bits per byte', s['val_bits_per_byte']),
      ('trigram bits per byte', s['trigram_bits_per_byte']),
      ('gzip bits per byte', s['gzip_bits_per_byte']),
      ('validation loss, nats per token', s['val_loss']),
      *([] if mtp_loss is None else [('validation loss of MTP modules', mtp_loss)]),
      ('validation perplexity', s['val_perplexity']),
      ('training loss, last 20 rows', s['train_loss_last_20_rows']),
    ],
    'Balance': [
      ('MaxVio_global', s['max_vio_global']),
      ('MaxVio of random routing', s['max_vio_noise_floor']),
      ('load CV, global', s['cv_global']),
      ('load entropy, global', s['load_entropy_global']),
      *((f'{title_of(key)}, global', s[key]) for key in s if key.endswith('_global') and key not in _SHOWN),
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
      ('training / validation bytes', f'{text(s["train_bytes"])} / {text(s["val_bytes"])}'),
    ],
  }
  return '<div class="grid small">\n' + '\n'.join(table(title, rows) for title, rows in groups.items()) + '\n</div>'


_SHOWN = ('max_vio_global', 'cv_global', 'load_entropy_global')


def _duration(seconds):
  if seconds is None:
    return None
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02} min' if hours else f'{minutes} min {seconds:02} s'
