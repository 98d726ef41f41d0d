"""Makes golden_logits.npz: the logits of transformers' models on the checkpoints of hf_cases.py.

python tests/interop/make_golden.py, where torch and transformers are installed.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import hf_cases
import numpy as np
import torch
import transformers


def main():
  logits = {'versions': np.array([f'transformers {transformers.__version__}', f'torch {torch.__version__}'])}
  for case in hf_cases.CASES:
    hf = hf_cases.fields_of(case)
    with tempfile.TemporaryDirectory() as folder:
      hf_cases.write(pathlib.Path(folder), hf, hf_cases.weights(hf))
      logits[case] = hf_cases.their_logits(folder, hf_cases.tokens(hf), hf['num_nextn_predict_layers'])
    print(f'{case}: logits {logits[case].shape} of size {np.abs(logits[case]).max():.3g}')
  np.savez_compressed(pathlib.Path(__file__).with_name('golden_logits.npz'), **logits)


if __name__ == '__main__':
  main()
