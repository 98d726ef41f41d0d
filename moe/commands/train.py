"""Trains a model, or continues the run in a directory.

moe train --config=tiny --workdir=runs/tiny --config.train.steps=500

Any setting of moe/config.py can be overridden. The workdir gets metrics.jsonl, checkpoints, summary.json and
report.html; the same command on the same workdir continues after an interruption.
"""

from absl import flags

from moe import cli
from moe.errors import UserError

CONFIG = cli.define_config('tiny')
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run, made if missing.')


def main(argv):
  if argv[1:]:
    raise UserError(f'unexpected argument {argv[1]!r}; settings look like --config.train.steps=500')
  if not WORKDIR.value:
    raise UserError('--workdir is missing; give the directory for the run, such as --workdir=runs/tiny')
  config = CONFIG()
  from moe.commands import run as whole  # takes seconds, which a mistake in the settings need not wait for

  summary = whole.train(config, WORKDIR.value)
  if summary:
    print_summary(summary)


def print_summary(summary: dict) -> None:
  """The run's result in a few lines."""
  mfu = f', {summary["mfu"]:.1%} MFU' if summary['mfu'] else ''
  lost = summary.get('tokenizer_loses')
  note = ', not comparable' if lost else ''
  print(
    f'validation {summary["val_bits_per_byte"]:.3f} bits/byte '
    f'(byte trigram {summary["trigram_bits_per_byte"]:.3f}, gzip {summary["gzip_bits_per_byte"]:.3f}{note})\n'
    f'MaxVio_global {summary["max_vio_global"]:.3f} (bias rule {summary["bias_rule"]}, auxiliary loss '
    f'{summary["aux_loss"]}; a balanced random router would show {summary["max_vio_noise_floor"]:.3f})\n'
    f'{summary["tokens"]:,} tokens in {summary["train_s"]:.0f} s, {summary["tokens_per_s"]:,.0f} tokens/s{mfu}\n'
    f'report: {WORKDIR.value}/report.html'
  )
  if lost:
    print(f'the tokenizer loses text ({lost:.0%} of a sample): its bits/byte compare with no other figure')
