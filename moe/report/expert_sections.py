"""The part of a run's page that is about its experts: which text they take, and how alike their loads are."""

from html import escape

from moe.balance import metrics
from moe.report import expert_figures as drawn
from moe.report.document import grid, section
from moe.report.routing import routed_text
from moe.report.run import Run

ELSEWHERE = ('max_vio', 'dead_experts')  # metrics that have a section of their own


def balance_sections(run: Run) -> list[str]:
  """Measures of the router's counts, dead experts, and the bias that holds the counts together."""
  logged = [name for name in dict.fromkeys([*metrics.METRICS, *run.logged_metrics]) if name not in ELSEWHERE]
  curves = [(title_of(name), _curve(run, name)) for name in logged]
  return [
    section('Measures of balance', _MEASURES, grid([pair for pair in curves if pair[1]]), _NO_LOADS),
    section('Dead experts', _DEAD, _one('Experts without tokens', drawn.dead_experts(run)), _no_dead_experts(run)),
    section('Router bias by expert', _BIAS, grid(drawn.bias_maps(run)), 'The bias of each expert was not logged.'),
  ]


def text_sections(run: Run) -> list[str]:
  """What the experts are for, as far as the run says: of versions before it did, nothing."""
  experts = run.experts
  if experts is None:
    return [section('What experts do', '', '', _NO_EXPERTS)]
  where = f'{"a sample of the validation text" if experts.is_sample else "the validation text"}, step {experts.step}'
  bits = [
    (f'On {where}', drawn.specialisation(run, experts)),
    ('By step', drawn.specialisation_over_time(run)),
  ]
  kinds = (
    f' {experts.token_kinds} token ids are told apart, which {experts.routed_of_kinds:.0%} of the choices are for.'
  )
  text = routed_text(experts.text, run.layer_names) if experts.text else ''
  by = f'Of {where}, told apart by {experts.by}. '
  return [
    section('Routing of a text', _ROUTES, text, 'No text was evaluated.'),
    section('Specialisation', _BITS + kinds, grid([(title, figure) for title, figure in bits if figure]), ''),
    section('Load by source', by + _SOURCES, grid(drawn.source_loads(run, experts)), _ONE_SOURCE),
    section('Validation loss by source', _LOSSES, _one('Loss by source', drawn.source_loss(run)), _no_source_loss(run)),
  ]


def title_of(key: str) -> str:
  """What NAME, NAME_batch or NAME_global is called on a page, escaped."""
  name = key.removesuffix('_batch').removesuffix('_global')
  return escape(metrics.METRICS[name].title if name in metrics.METRICS else name)


def _one(title, figure):
  return grid([(title, figure)] if figure else [])


def _curve(run, name):
  found = drawn.by_layer(run, name) if name in metrics.METRICS else None
  return found or drawn.mean_only(run, name)


def _no_dead_experts(run):
  return 'Every expert got tokens in every logged batch.' if len(run.load_history) else _NO_LOADS


def _no_source_loss(run):
  return _ONE_SOURCE if any('source_loss' in row for row in run.evals) else 'The loss of each source was not logged.'


_NO_LOADS = 'No expert loads were logged.'
_ONE_SOURCE = 'The validation text is of one source, as far as its names tell.'
_NO_EXPERTS = 'Which text experts get was not logged: the run is of an older version, or was not evaluated yet.'
_MEASURES = 'Of one training batch each: running means bold, what they are of faint. Of metrics of plugins, the mean.'
_DEAD = 'Experts that no token of a logged training batch was sent to, by layer.'
_BIAS = 'What the bias rule has added to the score of each expert, by step: orange or violet is far from the start.'
_ROUTES = (
  'Tokens in the colour of the expert with the largest gate weight; point at one to see all of its experts. A dot is a '
  'token that adds nothing to the text by itself: BOS, or bytes of a character that a later one ends. The router of an '
  'MTP module looks at the token after each as well.'
)
_BITS = (
  'Mutual information of token and expert, H(token) + H(expert) - H(token, expert): how many bits the choice of an '
  'expert tells of which token it was for. Bars are corrected by what as many tokens that tell nothing would show '
  '(Miller and Madow); dots are not. 0: routing does not depend on the token; at most the dash, the entropy of the '
  'expert.'
)
_SOURCES = (
  'Load of an expert / mean of the source: what is red for one source and blue for another is specialised in it.'
)
_LOSSES = 'Cross-entropy of the next token, by what the names of the validation documents tell of where they are from.'
