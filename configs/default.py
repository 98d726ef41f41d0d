"""The defaults of moe/config.py, unchanged: a byte-level DeepSeek-V3 on the source text of Python's standard library.

python experiments/train.py --config=configs/default.py --workdir=runs/default

Where a new config starts: list only what differs. 4 layers (1 dense), d 128, 16 + 1 experts of width 128, top-4,
1 MTP module.
"""

from moe.config import Config, to_config_dict


def get_config(arg: str = ''):
  return to_config_dict(Config(), arg)
