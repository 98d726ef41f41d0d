"""Ours exported and loaded by transformers, theirs saved and loaded by us; runs where torch is installed."""

import dataclasses
import json

import hf_cases
import numpy as np
import pytest
import tokenizers
from our_runs import make_run, nested, random_arrays, read_hf, read_run

import moe
from moe.commands import run as whole
from moe.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from moe.data.tokenizer import load_saved
from moe.inference import chat
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings
from moe.inference.weights import prepare
from moe.interop import to_hf
from moe.parallel.resolved import Resolved

torch = pytest.importorskip('torch', reason='the live comparison needs torch; golden_logits.npz stands in for it')
transformers = pytest.importorskip('transformers', reason='the live comparison needs transformers')

# Torch and transformers warn of their own affairs.
pytestmark = pytest.mark.filterwarnings('default')

VARIANTS = {
  'everything': {},
  'tied_plain': {'tie_embeddings': True, 'q_lora_rank': 0, 'num_groups': 1, 'top_groups': 1, 'mtp_depth': 0},
  'yarn_without_mscale_3_dense': {'num_layers': 5, 'num_dense_layers': 3, 'yarn_mscale': 0.0, 'mtp_depth': 0},
  'no_yarn_no_dense': {'num_dense_layers': 0, 'yarn_factor': 1.0, 'vocab_size': 200, 'mtp_depth': 0},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_ours_loaded_by_transformers(variant, tiny_model, tmp_path, mesh_of):
  """Logits, MTP modules' too."""
  model = dataclasses.replace(tiny_model, **VARIANTS[variant])
  config = Config(model=model)
  arrays = random_arrays(config, std=0.3)
  run = make_run(tmp_path / 'run', config, arrays)
  to_hf.export_run(run, tmp_path / 'hf', 'float32', 20e3 / 1e9)
  compare(config, arrays, tmp_path / 'hf', mesh_of())


def test_routers_of_transformers_decide_the_same(tiny_model, tmp_path):
  """Experts and weights of `moe.open(...).route`, of a folder, beside what their routers give, as sets: theirs are not
  sorted."""
  config = Config(model=dataclasses.replace(tiny_model, vocab_size=257))
  run = make_run(tmp_path / 'run', config, random_arrays(config, std=0.3))
  to_hf.export_run(run, tmp_path / 'hf', 'float32')
  opened, ids = moe.open(tmp_path / 'hf', compute='float32', tokenizer='byte'), list(range(3, 60, 2))
  routes, found = opened.route(ids), []
  how = {'dtype': torch.float32, 'attn_implementation': 'eager', 'experts_implementation': 'eager'}
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', **how)
  for layer in model.model.layers:
    if hasattr(layer.mlp, 'gate'):
      layer.mlp.gate.register_forward_hook(lambda _, __, out: found.append([one.numpy() for one in out[1:]]))
  with torch.no_grad():
    model(torch.tensor([ids]), use_cache=False)
  assert len(found) == config.model.num_moe_layers
  for row, (weight_TK, expert_TK) in enumerate(found):
    theirs, ours = np.argsort(expert_TK, -1), np.argsort(routes.experts[row], -1)
    in_order = np.take_along_axis
    np.testing.assert_array_equal(in_order(routes.experts[row], ours, -1), in_order(expert_TK, theirs, -1))
    np.testing.assert_allclose(
      in_order(routes.weights[row], ours, -1), in_order(weight_TK, theirs, -1), rtol=1e-3, atol=1e-5
    )


def compare(config, arrays, folder, mesh):
  """Asserts that transformers finds the model of `arrays` in `folder`."""
  token_BS = np.random.default_rng(3).integers(0, config.model.vocab_size, (2, 20)).astype(np.int32)
  params = nested(config, arrays)
  ours = hf_cases.our_logits(config.model, params, arrays['bias_LE'], token_BS, mesh)
  theirs = hf_cases.their_logits(folder, token_BS, config.model.mtp_depth)
  assert np.abs(theirs).max() > 0.5
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_train_export_load(tmp_path, mesh_of):
  """A run of a few steps, its newest checkpoint exported: the same logits there, and the same tokens of a text."""
  (tmp_path / 'text').mkdir()
  for number in range(9):
    (tmp_path / 'text' / f'{number}.txt').write_text(f'{number} is what it is. ' * 40)
  widths = {'d_model': 32, 'd_ff': 48, 'd_expert': 16, 'num_experts': 8, 'num_layers': 2, 'kv_lora_rank': 16}
  config = Config(
    model=ModelConfig(**widths, vocab_size=280, qk_nope_dim=8, qk_rope_dim=8, v_dim=8, top_k=2, mtp_depth=0),
    balance=BalanceConfig(gamma=0.05),
    data=DataConfig(
      paths=str(tmp_path / 'text'), tokenizer='bpe', cache_dir=str(tmp_path), seq_len=32, val_fraction=0.2
    ),
    train=TrainConfig(steps=4, batch_size=8, eval_sequences=4, sample_tokens=0),
    optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=1),
  )
  whole.train(config, str(tmp_path / 'run'))
  to_hf.export_run(tmp_path / 'run', tmp_path / 'hf', 'float32')
  arrays, step = read_run(tmp_path / 'run', config)
  assert step == 4
  assert np.abs(arrays['bias_LE']).max() > 0.04
  compare(config, arrays, tmp_path / 'hf', mesh_of())
  tokenizer = load_saved(tmp_path / 'run' / 'tokenizer.json')
  expected = [tokenizer.bos_id, *tokenizer.encode(b'what it is')]  # as a document begins in training
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')('what it is').input_ids == expected


TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}{{ '<|user|>' + message.content | trim }}
{% generation %}{{ eos_token }}{% endgeneration %}
{% else %}{{ raise_exception('who?') }}{% endif %}{% endfor %}
{% if add_generation_prompt %}<|user|>{{ tools | tojson }}{% endif %}"""


@pytest.mark.parametrize('adds_bos', [True, False, None])
def test_prompts_and_conversations(adds_bos, tmp_path):
  """The same tokens, of a text and by a chat template, whatever the folder says of BOS."""
  words = ['<s>', '</s>', '<|user|>', *'\u0120abcdelnu<|>\u010a/']
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(words[:3])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 0)])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  fields = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>'}
  fields |= {} if adds_bos is None else {'add_bos_token': adds_bos}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
  (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_saved(tmp_path / 'tokenizer.json')
  assert theirs('a bed').input_ids == [*ours.begin_ids, *ours.encode(b'a bed')]
  messages = [{'role': 'user', 'content': ' a bed '}]
  expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert chat.encode(messages, ours) == expected


def test_theirs_loaded_by_us(tmp_path, mesh_of):
  """Fresh weights of theirs as save_pretrained writes them, and 64 tokens that generate continues a prompt with."""
  hf = hf_cases.fields_of('q_lora_groups')
  fields = {name: value for name, value in hf.items() if name not in ('architectures', 'model_type', 'rope_scaling')}
  torch.manual_seed(0)
  theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields, initializer_range=0.3)).eval()
  theirs.set_experts_implementation('eager')
  for layer in theirs.model.layers[hf['first_k_dense_replace'] :]:
    layer.mlp.gate.e_score_correction_bias.uniform_(0, 0.3)
  theirs.save_pretrained(tmp_path / 'hf')
  prompt_BS = torch.from_numpy(hf_cases.tokens(hf, 8)).long()
  everything = torch.ones_like(prompt_BS)  # else it takes tokens 0 for padding
  token_BS = theirs.generate(prompt_BS, attention_mask=everything, max_new_tokens=64, do_sample=False, pad_token_id=0)
  assert token_BS.shape == (2, 72)
  with torch.no_grad():
    expected_BSV = theirs(token_BS).logits.numpy()
  model, params, bias_LE = read_hf(tmp_path / 'hf', mesh_of())
  token_BS = token_BS.numpy().astype(np.int32)
  (ours_BSV,) = hf_cases.our_logits(model, params, bias_LE, token_BS, mesh_of())
  np.testing.assert_allclose(ours_BSV, expected_BSV, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(ours_BSV.argmax(-1)[:, 7:-1], token_BS[:, 8:])  # so greedy decoding writes the same
  config = Resolved(model=model, dispatch='local', grouped_matmul='blocked')
  settings = Settings(config, Sampling(), eos_ids=(), capacity=72, drafts=0)
  generator = Generator(prepare(params, bias_LE, config, mesh_of()), settings, mesh_of(), slots=2, prompt_chunk=8)
  completions, _ = generator.run(token_BS[:, :8].tolist(), 64, [0, 0])
  assert [completion.tokens for completion in completions] == token_BS[:, 8:].tolist()
