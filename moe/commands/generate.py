"""Continues prompts with a trained model.

moe generate --checkpoint=runs/tiny --prompt="def "
moe generate --checkpoint=runs/tiny --prompt="def " --drafts=1 --temperature=0
moe generate --checkpoint=folder --prompt="What is a monad?" --chat

Text streams to stdout as it comes, or, with several prompts, when all of them have ended; figures go to stderr.
--chat asks, by the chat template of the folder that the model is from, and prints the answer only.
--drafts speculates: the model's MTP module proposes so many tokens, and the model checks them in one pass. That
pays where reading weights takes most of a step, as on GPUs with few sequences; on a CPU it mostly takes longer.
"""

import sys

from absl import flags

from moe.data.text import TextStream
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference import chat, generate, quantize, weights
from moe.inference import flags as model_flags
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings
from moe.parallel.mesh import platform_of
from moe.validation import utf8

flags.adopt_module_key_flags(model_flags)
PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue; give it again for more prompts.')
MOST_TOKENS = 10**7  # no cache holds more
MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 200, 'New tokens per prompt at most.', lower_bound=1, upper_bound=MOST_TOKENS
)
CACHE_TOKENS = flags.DEFINE_integer(
  'cache_tokens', 0, 'Length of the cache; 0: what the longest prompt needs.', lower_bound=0, upper_bound=MOST_TOKENS
)
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'Of the softmax; 0 is greedy.')
CHAT = flags.DEFINE_bool('chat', False, "Ask, by the chat template of the model's folder; only the answer is printed.")
TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw from the likeliest tokens only; 0: from all.')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw from the fewest tokens that hold this probability; 1: from all.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the first prompt; the next one has the next.')
STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends a continuation; give it again for more.')
DRAFTS = flags.DEFINE_integer('drafts', 0, 'Tokens the MTP module drafts per step; 0: none.', 0, 64)
QUANTIZE = flags.DEFINE_enum(
  'quantize',
  'none',
  quantize.SCHEMES,
  'Weights in FP8, or experts in MXFP4 and the rest in FP8; those that a folder holds quantised stay as they are.',
)
DEQUANTIZE = flags.DEFINE_bool('dequantize', False, 'Load what a folder holds quantised as plain numbers.')


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; a prompt is given by --prompt')
  if not PROMPT.value or '' in PROMPT.value:
    raise UserError('the prompt is empty; give a text, such as --prompt="def "')
  how = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  model = model_flags.load_model(quantized=not DEQUANTIZE.value)
  prompts = [encode(text, model.tokenizer) for text in PROMPT.value]
  seeds = [SEED.value + i for i in range(len(prompts))]
  capacity = CACHE_TOKENS.value or max(map(len, prompts)) + MAX_TOKENS.value
  settings = Settings(model.config, how, model.eos_ids, capacity, DRAFTS.value)
  generate.check_request(prompts, MAX_TOKENS.value, seeds, len(prompts), settings)
  if DRAFTS.value and platform_of(model.mesh) == 'cpu':
    print('drafts seldom pay on a CPU: checking one more token takes it nearly as long as making it', file=sys.stderr)
  ready = weights.prepare(model.params, model.bias_LE, model.config, model.mesh, QUANTIZE.value)
  model = model._replace(params={})  # so that the memory is there for the cache
  show(generate.Generator(ready, settings, model.mesh, len(prompts)), prompts, seeds, model.tokenizer)


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
  """The tokens of a document that begins with `text`, or of a conversation that does."""
  encoded = utf8('the prompt', text)
  if CHAT.value:
    return chat.encode([{'role': 'user', 'content': text}], tokenizer)
  return [*tokenizer.begin_ids, *map(int, tokenizer.encode(encoded))]


def show(generator: generate.Generator, prompts: list[list[int]], seeds: list[int], tokenizer: Tokenizer) -> None:
  """Generates, and prints the texts and the figures.

  Args:
    generator: with a slot for each prompt.
    prompts: token ids of each.
    seeds: of each one's draws.
    tokenizer: that turns tokens into text.
  """
  streams, alone = [TextStream(tokenizer, STOP.value, prompt) for prompt in prompts], len(prompts) == 1

  def add(row, tokens):
    new = streams[row].add(tokens)
    if alone:
      print(new, end='', flush=True)
    return streams[row].stopped

  if alone and not CHAT.value:
    print(PROMPT.value[0], end='', flush=True)
  completions, stats = generator.run(prompts, MAX_TOKENS.value, seeds, add)
  for prompt, stream, completion in zip(PROMPT.value, streams, completions, strict=True):
    rest = stream.add([], last=completion.finish != 'stopped')
    shown = f'{prompt}\n' if CHAT.value else prompt
    print(rest if alone else f'--- {completion.finish} ---\n{shown}{stream.text}')
  print(stats, file=sys.stderr)
