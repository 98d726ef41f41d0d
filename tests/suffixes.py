"""Whether names of traced arrays say how many axes they have, over all of moe/: `x_TD` has two.

A suffix is made of the legend's letters (moe/__init__.py), digits for axes of that size, and letters that a function
explains, one axis each; X alone stands for any number of axes.
"""

import contextlib
import pathlib
import re
import sys

import jax
import numpy as np

MOE = str(pathlib.Path(__file__).resolve().parents[1] / 'moe')
SUFFIX = re.compile(r'(?:^|_)(e?[A-Z][A-Z\d]*e?|e)$')  # of names such as x_TD, size_e, w_eDF, biased_TGe
NO_SUFFIX = {'T', 'D', 'E', 'M', 'F', 'K', 'N', 'S', 'B', 'V', 'C', 'H', 'R', 'U', 'A', 'W', 'G', 'L', 'P', 'e'}


def axes(name: str) -> str | None:
  """The letters that `name` ends in, if it says its axes. A name that is a letter is a size."""
  found = SUFFIX.search(name)
  return found[1] if found and name not in NO_SUFFIX and name != found[1] else None


def mismatch(name: str, value) -> str | None:
  """'w_DCR has 2 axes', if so. Axes of layers or other copies are not in a name: whoever stacks says so in its own."""
  letters = axes(name) if isinstance(value, jax.Array | np.ndarray) else None
  if letters is None or 'X' in letters or len(letters) == value.ndim:
    return None
  return f'{name} has {value.ndim} axes'


@contextlib.contextmanager
def watched():
  """Yields a set that fills with 'file:function: name has n axes' as functions of moe/ return."""
  found = set()

  def on_return(frame, event, _):
    if event == 'return' and frame.f_code.co_filename.startswith(MOE):
      for name, value in frame.f_locals.items():
        if wrong := mismatch(name, value):
          file = frame.f_code.co_filename[len(MOE) + 1 :]
          found.add(f'{file}:{frame.f_code.co_name}: {wrong}')

  before = sys.getprofile()
  sys.setprofile(on_return)
  try:
    yield found
  finally:
    sys.setprofile(before)
