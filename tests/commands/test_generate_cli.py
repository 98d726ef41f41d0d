"""experiments/generate.py and evaluate.py on a run of two steps, on its exports, and on what they refuse."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import environment, script

from moe.commands import run as whole
from moe.config import CheckpointConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from moe.data.tokenizer import ByteTokenizer
from moe.errors import UserError
from moe.files import digests
from moe.inference import flags as model_flags  # noqa: F401  declared once, whichever script comes first
from moe.inference import load
from moe.interop import to_hf
from moe.model import transformer
from moe.train.checkpoint import Checkpoints
from moe.train.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = 'def x'
# As many values as two devices and the 32 that share an MXFP4 scale want.
MODEL = ModelConfig(
  vocab_size=300, d_model=32, num_layers=2, num_dense_layers=1, d_ff=64, d_expert=64, num_experts=4, top_k=2,
  num_heads=2, kv_lora_rank=16, qk_nope_dim=8, qk_rope_dim=8, v_dim=16, mtp_depth=1,
)  # fmt: skip


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp('corpus'), np.random.default_rng(0)
  for name in range(12):
    words = rng.choice(['def ', 'return ', 'x', 'y', ' = ', '(', ')', '\n', 'é'], 300)
    (folder / f'{name:02}.py').write_text(''.join(words))
  return folder


@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory, unrendered):
  """A run with a byte-pair tokenizer and an MTP module."""
  workdir = tmp_path_factory.mktemp('run')
  data = DataConfig(str(corpus), tokenizer='bpe', seq_len=32, val_fraction=0.2, cache_dir=str(workdir / 'cache'))
  train = TrainConfig(steps=2, batch_size=4, sample_tokens=0, eval_every=0)
  whole.train(Config(model=MODEL, data=data, train=train, checkpoint=CheckpointConfig()), str(workdir / 'run'))
  return workdir / 'run'


@pytest.fixture(scope='module')
def folder(run, tmp_path_factory):
  """Its export in float32."""
  target = tmp_path_factory.mktemp('hf') / 'plain'
  to_hf.export_run(run, target, 'float32', 5.0, None)
  return target


@pytest.fixture
def text_of(capsys):
  """text_of(checkpoint, *arguments): what generate.py prints, greedily, and its figures."""

  def text_of(checkpoint, *arguments):
    capsys.readouterr()
    always = f'--checkpoint={checkpoint}', f'--prompt={PROMPT}', '--max_tokens=10', '--temperature=0'
    script('generate', *always, *arguments)
    return capsys.readouterr()

  return text_of


def test_text_of_a_run_and_of_its_folder(run, folder, text_of):
  out, figures = text_of(run)
  assert out.startswith(PROMPT)
  assert len(out) > len(PROMPT) + 1
  assert re.search(r'^\d+ prompt tokens in .* tokens decoded in .* tokens/s$', figures.strip())
  assert text_of(folder).out == out
  assert text_of(run, '--expert=2', '--tensor=2').out == out
  speculative = text_of(folder, '--drafts=1')
  assert speculative.out == out
  assert 'drafts accepted, by position' in speculative.err
  assert 'drafts seldom pay on a CPU' in speculative.err
  assert 'drafts' not in figures


def test_quantised_text(run, text_of, tmp_path):
  """The run, quantised as it is loaded; and a folder that holds it so, as it is and dequantised."""
  for kind, *mesh in (('fp8',), ('mxfp4', '--expert=2')):
    assert text_of(run, f'--quantize={kind}', *mesh).out.startswith(PROMPT)
  to_hf.export_run(run, tmp_path / 'hf', 'float32', 5.0, 'mxfp4')
  held = text_of(tmp_path / 'hf').out
  assert held.startswith(PROMPT)
  assert text_of(tmp_path / 'hf', '--dequantize').out == held


def test_chat(folder, text_of, tmp_path):
  """The answer alone; to a template that says what a document does, the text that goes on from there."""
  plain = text_of(folder).out
  shutil.copytree(folder, tmp_path / 'hf')
  (tmp_path / 'hf' / 'chat_template.jinja').write_text("{{ bos_token }}{{ messages[0]['content'] }}")
  assert PROMPT + text_of(tmp_path / 'hf', '--chat').out == plain
  assert f'{PROMPT}\n' in text_of(tmp_path / 'hf', '--chat', f'--prompt={PROMPT}').out  # of several, each
  with pytest.raises(UserError, match='there is no chat template'):
    text_of(folder, '--chat')


def test_several_prompts_and_a_stop(run, capsys):
  always = f'--checkpoint={run}', '--max_tokens=6', '--prompt=x', '--prompt=y =', '--cache_tokens=40'
  script('generate', *always, '--stop=never there')
  out = capsys.readouterr().out
  assert re.search(r'^--- (end|length) ---\nx.*--- (end|length) ---\ny =', out, re.DOTALL)
  script('generate', *always, '--data=2')
  assert capsys.readouterr().out == out


def test_evaluation(run, folder, corpus, capsys):
  found = []
  for checkpoint, *arguments in (
    (run,),
    (folder, f'--paths={corpus}', '--expert=2', '--tensor=2', '--batch=3'),
    (run, '--quantize=mxfp4', '--sequences=4'),
  ):
    capsys.readouterr()
    script('evaluate', f'--checkpoint={checkpoint}', *arguments)
    found.append(json.loads(capsys.readouterr().out))
    numbers = [value for value in found[-1].values() if isinstance(value, int | float | list)]
    assert np.isfinite(np.concatenate([np.ravel(value) for value in numbers])).all()
  of_run, of_folder, rounded = found
  assert (of_run['step'], of_folder['step']) == (2, 0)
  logged = json.loads((run / 'evals.jsonl').read_text().splitlines()[-1])
  for name in ('val_loss', 'val_bits_per_byte', 'val_tokens', 'val_mtp_loss', 'max_vio_global'):
    assert of_run[name] == pytest.approx(logged[name], rel=1e-5)
  assert of_folder['val_tokens'] < of_run['val_tokens']  # on a validation split of its own
  assert 4 * 30 < rounded['val_tokens'] <= 4 * 32  # a document's start is no target
  assert abs(rounded['val_loss'] - of_run['val_loss']) < 0.3


def test_evaluation_on_text_that_has_changed(run, corpus):
  """Another file splits the text otherwise, so that most of the new validation text was training text."""
  (corpus / 'new.py').write_text('x = y\n' * 50)
  try:
    with pytest.raises(UserError, match=r'began with other text .*; restore it or name the text to evaluate on'):
      script('evaluate', f'--checkpoint={run}')
    script('evaluate', f'--checkpoint={run}', f'--paths={corpus}', '--sequences=1')
  finally:
    (corpus / 'new.py').unlink()


def test_what_a_folder_says(run, folder, tmp_path):
  """Its dtype, its end tokens, and how long its sequences are; a run ends where the next document would begin."""
  model = load.load(folder, MeshConfig())
  assert (model.config.precision.compute, model.config.data.seq_len) == ('float32', 32)
  assert model.eos_ids == load.load(run, MeshConfig()).eos_ids == (model.tokenizer.bos_id,)
  other = with_fields(folder, tmp_path / 'other', eos_token_id=[7, 9], torch_dtype='bfloat16')
  model = load.load(other, MeshConfig())
  assert (model.config.precision.compute, model.eos_ids) == ('bfloat16', (7, 9))
  (other / 'generation_config.json').write_text('{"eos_token_id": 5}')
  assert load.load(other, MeshConfig()).eos_ids == (5,)
  (other / 'generation_config.json').write_text('[')
  with pytest.raises(UserError, match=r'generation_config\.json is no valid JSON'):
    load.load(other, MeshConfig())


def with_fields(folder, target, **fields):
  """A copy of the folder with another config.json."""
  shutil.copytree(folder, target)
  (target / digests.FILE).unlink()
  file = target / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  return target


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--prompt='], 'the prompt is empty'),
    ([], 'the prompt is empty'),
    (['--prompt=a\udcff'], 'is not UTF-8'),
    (['--prompt=x', '--temperature=-1'], r'temperature = -1\.0 must be 0'),
    (['--prompt=x', '--top_p=1.5'], r'top_p = 1\.5 must be above 0 and at most 1'),
    (['--prompt=x', '--seed=-1'], 'seed = -1'),
    (['--prompt=x = y', '--cache_tokens=3'], 'do not fit the cache of 3 tokens'),
    (['--prompt=x', '--dtype=float16'], "dtype 'float16' must be float32"),
    (['--prompt=x', '--tensor=3'], 'must be divisible by the tensor axis of the mesh, 3'),
    (['--prompt=x', '--stop='], 'a stop string is empty'),
    (['--prompt=x', '--tokenizer=none.json'], r"tokenizer 'none\.json' does not exist"),
  ],
)
def test_bad_requests(arguments, says, run):
  with pytest.raises(UserError, match=says):
    script('generate', f'--checkpoint={run}', *arguments)


@pytest.fixture(scope='module')
def byte_run(tmp_path_factory):
  """byte_run(vocab_size): a run on bytes without an MTP module."""

  def byte_run(vocab_size):
    path = tmp_path_factory.mktemp('bytes')
    config = Config(model=dataclasses.replace(MODEL, vocab_size=vocab_size, mtp_depth=0))
    rng, abstract = np.random.default_rng(0), transformer.abstract_params(config)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract)
    bias_LE = jnp.zeros((config.model.num_routers, config.model.num_experts))
    checkpoints = Checkpoints(path)
    checkpoints.save(TrainState(jnp.zeros((), int), params, {'bias_LE': bias_LE}, ()), {'step': 1, 'tokens': 0})
    checkpoints.close()
    ByteTokenizer().save(path / 'tokenizer.json')
    (path / 'config.json').write_text(json.dumps({'config': dataclasses.asdict(config)}))
    return path

  return byte_run


def test_bad_checkpoints(folder, byte_run, tmp_path, capsys):
  plain, small = byte_run(257), byte_run(200)
  to_hf.export_run(plain, tmp_path / 'bytes', 'bfloat16', 5.0, None)
  no_shard = with_fields(folder, tmp_path / 'no_shard')
  next(no_shard.glob('*.safetensors')).unlink()
  no_modules = with_fields(tmp_path / 'bytes', tmp_path / 'no_modules', num_nextn_predict_layers=1)
  to_hf.export_run(plain, tmp_path / 'fp8', 'bfloat16', 5.0, 'fp8')
  for checkpoint, arguments, says in (
    (tmp_path / 'nothing', [], 'is neither a run directory nor a folder'),
    (with_fields(folder, tmp_path / 'llama', model_type='llama'), [], "model_type = 'llama'"),
    (no_shard, [], 'safetensors, which is missing'),
    (tmp_path / 'bytes', [], 'has no tokenizer.json; give --tokenizer=FILE, or --tokenizer=byte'),
    (small, [], r'257 token ids, and the model in .* a vocabulary of 200'),
    (plain, ['--drafts=1'], 'needs a model with an MTP module'),
    (no_modules, ['--drafts=1', '--tokenizer=byte'], 'needs a model with an MTP module'),
    (tmp_path / 'fp8', ['--tensor=2', '--tokenizer=byte'], 'load it dequantised'),
  ):
    with pytest.raises(UserError, match=says):
      script('generate', f'--checkpoint={checkpoint}', '--prompt=x', *arguments)
  assert 'names 1 MTP module(s) and the files hold none' in capsys.readouterr().err


def test_from_outside(run):
  """On virtual devices, as a process of its own; and a mistake as one line, with nothing said before."""
  command = [sys.executable, 'experiments/generate.py', f'--checkpoint={run}', f'--prompt={PROMPT}', '--max_tokens=4']
  call = lambda *more: subprocess.run(
    [*command, *more], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
  )
  good = call('--cpu_devices=2', '--expert=2', '--drafts=1')
  assert good.returncode == 0, good.stderr
  assert good.stdout.startswith(PROMPT)
  bad = call('--max_tokens=9', '--cache_tokens=8')
  assert (bad.returncode, bad.stdout) == (2, '')
  assert re.fullmatch(
    r'error: prompt 0 of \d+ tokens and 9 new ones do not fit the cache of 8 tokens; .*\n', bad.stderr
  )
