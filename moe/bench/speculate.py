"""Generation by a trained model, one sequence at a time: plain, and with drafts of its MTP module."""

import statistics
from typing import Any

from moe.bench import timing
from moe.inference import generate, weights
from moe.inference.load import Model
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings

PROMPTS = (
  'def ',
  'import os\nimport sys\n\n\n',
  'class Config:\n  """',
  'import numpy as np\n\n\ndef test_',
)
NEW, DRAFTS, TEMPERATURES = 256, (0, 1, 2), (0.0, 0.7)


def measure(model: Model, repeats: int) -> list[dict]:
  """A row per temperature and number of drafts; drafts are taken in turn, so that all meet the same noise.

  'of_plain': tokens per second of decoding over those without drafts. 'accepted': share of each draft, by its place.
  'same_tokens', of greedy rows: share of the plain row's tokens that come out. In bfloat16 the passes of one and of
  several tokens round differently, so that now and then another token is the likeliest, and all after it differ.

  Raises:
    UserError: the model has no MTP module.
  """
  ready = weights.prepare(model.params, model.bias_LE, model.config, model.mesh)
  prompts = [[model.tokenizer.bos_id, *map(int, model.tokenizer.encode(text.encode()))] for text in PROMPTS]
  capacity = max(map(len, prompts)) + NEW
  found = []
  for temperature in TEMPERATURES:
    settings = [Settings(model.config, Sampling(temperature), (), capacity, drafts) for drafts in DRAFTS]
    generators = {how.drafts: generate.Generator(ready, how, model.mesh, 1, steps_per_call=32) for how in settings}
    calls: dict[int, list] = {drafts: [] for drafts in DRAFTS}
    for turn in range(repeats + 1):  # the first compiles
      for drafts, generator in generators.items():
        if not turn:
          timing.say(f'speculate: temperature {temperature}, {drafts} drafts, compile')
        calls[drafts].append([generator.run([prompt], NEW, [turn]) for prompt in prompts])
    rows = [_row(temperature, drafts, calls[drafts][1:], calls[0][1:]) for drafts in DRAFTS]
    for row in rows:
      found.append(row | {'of_plain': row['decode_tokens_per_s'] / rows[0]['decode_tokens_per_s']})
      timing.say('speculate: ' + '  '.join(f'{key} {value}' for key, value in found[-1].items()))
  return found


def _row(temperature: float, drafts: int, turns: list, plain: list) -> dict:
  """turns, plain: of each repetition the results of all prompts."""
  rate = lambda turn: sum(stats.decoded_tokens for _, stats in turn) / sum(stats.decode_s for _, stats in turn)
  row: dict[str, Any] = {'shape': f'temperature {temperature}', 'name': f'{drafts} drafts'}
  row['decode_tokens_per_s'] = statistics.median(map(rate, turns))
  all_stats = [stats for turn in turns for _, stats in turn]
  if drafts:
    checked = sum(stats.checked for stats in all_stats)
    accepted = [sum(stats.accepted_k[place] for stats in all_stats) / checked for place in range(drafts)]
    row['accepted'] = ' '.join(f'{share:.1%}' for share in accepted)
    row['tokens_per_step'] = sum(stats.decoded_tokens for stats in all_stats) / checked
  if not temperature:
    tokens = lambda turn: [token for (completion,), _ in turn for token in completion.tokens]
    row['same_tokens'] = sum(map(int.__eq__, tokens(turns[0]), tokens(plain[0]))) / len(tokens(plain[0]))
  return row
