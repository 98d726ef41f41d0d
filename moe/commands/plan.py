"""What pipeline schedules would cost: their bubbles, what a rank holds, and a picture of rank x time.

moe plan --ranks=4 --microbatches=8                                    # all schedules side by side
moe plan --schedule=dualpipe_v --ranks=4 --microbatches=8 --plot=v.png
"""

from absl import flags

from moe.errors import UserError
from moe.files.paths import output_file
from moe.parallel.schedule import SCHEDULES, Times, check, make
from moe.plan import pipeline
from moe.report.figures import SUFFIXES, save

MOST = 64, 1024  # ranks and microbatches: tables are Python's work

SCHEDULE = flags.DEFINE_list('schedule', list(SCHEDULES), f'Of {", ".join(SCHEDULES)}; comma-separated.')
RANKS = flags.DEFINE_integer('ranks', 4, 'Ranks of the pipeline.', 2, MOST[0])
MICROBATCHES = flags.DEFINE_integer('microbatches', 8, 'Microbatches of a step.', 1, MOST[1])
TIMES = flags.DEFINE_list(
  'times',
  ['1', '1', '1'],
  'How long a stage takes forward, for the gradient of its inputs and for that of its weights; a fourth number: a '
  'forward beside a whole backward of another microbatch, instead of their sum.',
)
PLOT = flags.DEFINE_string('plot', '', 'A picture of rank x time: a .png, .pdf or .svg.')
LOCKSTEP = flags.DEFINE_bool(
  'lockstep', False, 'Draw ranks that wait for each other after each tick, with packed cells; else they run freely.'
)


def main(argv):
  if len(argv) > 1:
    raise UserError(f'moe plan takes no argument {argv[1]!r}; usage: moe plan --ranks=4 --microbatches=8')
  times, size = _times(TIMES.value), (RANKS.value, MICROBATCHES.value)
  path = output_file(PLOT.value, '--plot', SUFFIXES) if PLOT.value else None
  for name in SCHEDULE.value:
    check(name)
  costs, refused = [], []
  for name in SCHEDULE.value:
    try:
      costs.append(pipeline.cost(name, *size, times))
    except UserError as error:
      refused.append(str(error))
  if not costs:
    raise UserError('; '.join(refused))
  print(f'{size[0]} ranks, {size[1]} microbatches: how long a rank waits, and how many stages it holds at once')
  print(pipeline.table(costs))
  for line in refused:
    print(f'not shown: {line}')
  if path:
    how = times if LOCKSTEP.value else None
    save(pipeline.picture([make(one.name, *size, how) for one in costs], times, LOCKSTEP.value), path)
    print(f'picture: {path}')


def _times(texts) -> Times:
  """Raises UserError: not three or four positive numbers."""
  try:
    numbers = [float(text) for text in texts]
  except ValueError:
    numbers = []
  if len(numbers) not in (3, 4) or not all(0 < number < 1e9 for number in numbers):
    raise UserError(f"--times = {','.join(texts)!r} must be 3 or 4 positive numbers, such as '1,1,1' or '1,1,1,2.5'")
  return Times(*numbers)
