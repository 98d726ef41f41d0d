"""A whole run: training, then a sample of what it writes, then the report."""

from moe.config import Config
from moe.files import write_atomically
from moe.inference.generate import continuation
from moe.inference.sampling import Sampling
from moe.report.html import write_report
from moe.train import loop

SAMPLING = Sampling(temperature=0.8)


def train(config: Config, workdir: str, callbacks=()) -> dict | None:
  """Trains, or goes on training, the run in `workdir`; see `moe.train.loop.train`.

  Returns:
    The summary of the finished run (as in summary.json), or None if a signal ended it early, with everything saved.
  """
  finished = loop.train(config, workdir, [*callbacks, Sample(), report := Report()])
  return report.summary if finished else None


class Sample(loop.Callback):
  """Writes sample.txt, if one is wanted."""

  def finished(self, run: loop.Run) -> bool:
    train, text = run.config.train, None
    if train.sample_tokens:
      with loop.progress(0, train.sample_tokens, 'token', 'sample', leave=False) as bar:

        def on_tokens(_, tokens):
          bar.update(len(tokens))
          return run.stop()

        weights = run.weights()
        model = weights.params, weights.balance['bias_LE'], run.tokenizer, run.config, run.flat_mesh
        text = continuation(*model, train.sample_prompt, train.sample_tokens, SAMPLING, train.seed, on_tokens)
    if run.stop():
      return False
    if run.logbook and text is not None:
      write_atomically(run.path / 'sample.txt', text)
    return True


class Report(loop.Callback):
  """Writes summary.json and report.html; `summary` is {} on all processes but the first."""

  summary: dict | None = None

  def finished(self, run: loop.Run) -> bool:
    loop.say('writing the report')
    self.summary = write_report(run.path) if run.logbook else {}
    return True
