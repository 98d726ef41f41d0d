"""Loss-free balanced mixture-of-experts language models in JAX.

Names of arrays end in their logical axes, one letter each (`x_TD`, `w_up_eDF`); the same letters decide how a
parameter is sharded (`moe/parallel/sharding.py`). The legend:

    B  batch (sequences)                 H  attention heads
    S  sequence (positions)              A  query latent rank
    T  tokens: B * S of one shard        C  key/value latent rank
    D  model width                       N  non-rotary head dim
    F  feed-forward hidden width         R  rotary head dim
    V  vocabulary, padded to 128         U  value head dim
    E  experts, all of them              L  layers
    e  experts held by this shard        M  dispatched rows (token copies)
    K  experts per token (top-k)         G  expert groups
    P  parts of a sum                    W  width of a row of MLA's cache, C + R
    Q  columns of all heads' queries     X  any number of axes

Other quantities carry their unit in the name: `_s` seconds, `_bytes`, `_per_step`, `_per_s`.
"""

import importlib

__version__ = '0.1.0'

# The front door for other programs, loaded when it is used: name -> module.
_PUBLIC = {'MoE': 'moe.model.standalone', 'NNXMoE': 'moe.model.modules', 'LinenMoE': 'moe.model.modules'}
_PUBLIC |= {'open': 'moe.inference.opened'}
__all__ = [*_PUBLIC, '__version__']


def __getattr__(name: str):
  if name in _PUBLIC:
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
