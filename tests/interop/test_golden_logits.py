"""Checkpoints that transformers computed logits of, loaded by us (golden_logits.npz, made by make_golden.py)."""

import pathlib

import hf_cases
import numpy as np
import pytest
from our_runs import read_hf

GOLDEN = np.load(pathlib.Path(__file__).with_name('golden_logits.npz'))


@pytest.mark.parametrize('case', hf_cases.CASES)
def test_logits_of_transformers(case, tmp_path, mesh_of):
  hf = hf_cases.fields_of(case)
  hf_cases.write(tmp_path, hf, hf_cases.weights(hf))
  model, params, bias_LE = read_hf(tmp_path, mesh_of())
  assert model.mtp_depth == hf['num_nextn_predict_layers']
  logits_BSV = hf_cases.our_logits(model, params, bias_LE, hf_cases.tokens(hf), mesh_of())
  assert np.abs(GOLDEN[case]).max() > 0.5  # there is something to compare
  np.testing.assert_allclose(logits_BSV, GOLDEN[case], rtol=0, atol=1e-4)
