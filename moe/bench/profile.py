"""Which kernels take the time of a call, from the profiler's own records."""

import collections
import pathlib
import tempfile
from collections.abc import Callable

import jax
from jax.profiler import ProfileData

from moe.bench.timing import synchronize


def top_kernels(call: Callable, calls: int = 3, count: int = 10) -> list[tuple[str, float, float]]:
  """(name, milliseconds per call, launches per call) of the kernels that take longest, longest first.

  On a CPU these are XLA's operations, and a loop's time holds that of the operations in it.

  Args:
    call: a function without arguments.
    calls: how often it is run.
    count: how many kernels are returned.
  """
  synchronize(call())  # nothing from before must still be running
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        result = call()
      synchronize(result)
    files = list(pathlib.Path(folder).rglob('*.xplane.pb'))
    events = [event for file in files for event in _kernel_events(ProfileData.from_file(str(file)))]
  taken_ns: collections.Counter[str] = collections.Counter()
  launches: collections.Counter[str] = collections.Counter()
  for name, ns in events:
    taken_ns[name] += ns
    launches[name] += 1
  return [(name, ns / 1e6 / calls, launches[name] / calls) for name, ns in taken_ns.most_common(count)]


def table(kernels: list) -> str:
  """Lines of print."""
  return '\n'.join(f'  {ms:9.3f} ms  x{launches:<6g} {name[:90]}' for name, ms, launches in kernels)


def _kernel_events(data):
  """(name, nanoseconds) of what GPUs ran, or of the operations that XLA:CPU ran if there are no GPUs."""
  planes = list(data.planes)
  on_gpu = [plane for plane in planes if plane.name.startswith('/device:GPU:')]
  for plane in on_gpu or (plane for plane in planes if plane.name.startswith('/host:CPU')):
    lines = list(plane.lines)
    # Beside the streams, a GPU's plane may have lines that sum the same time up by operation or module.
    streams = [line for line in lines if line.name.startswith('Stream')] if on_gpu else []
    for line in streams or lines:
      for event in line.events:
        if on_gpu or any(key == 'hlo_op' for key, _ in event.stats):
          yield event.name, event.duration_ns
