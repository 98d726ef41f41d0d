"""Runs training, evaluation and generation on every kind of mesh that the machine's devices make, beside one device.

python tests/smoke_meshes.py
python tests/smoke_meshes.py --cpu_devices=2    # the same on virtual devices

A line per mesh and job: losses or tokens, and how far they are from those of one device. Each mesh is a process of its
own, since what XLA dies of takes the process with it; the job it died in is a line, and the next process goes on after
it. The exit status is 1 if anything died, failed or was off.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import jax
import numpy as np

from moe.bench.step import Training, random_tokens
from moe.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, PrecisionConfig, TrainConfig
from moe.inference import generate, weights
from moe.inference.sampling import Sampling
from moe.inference.steps import Settings
from moe.parallel.mesh import make_mesh, platform_of, setup_devices, without_pipe
from moe.train import state
from moe.train.step import make_eval_step, resolve

PRECISIONS = {
  'float32': PrecisionConfig(),
  'bfloat16': PrecisionConfig(compute='bfloat16'),
  'fp8': PrecisionConfig(compute='bfloat16', fp8='experts,ffn'),
}
JOBS = {f'{what} {name}': (what, name) for what in ('train', 'evaluate', 'generate', 'draft') for name in PRECISIONS}
# Of the loss. float32 differs by the order of sums; the others by roundings of 2^-9, which Adam's first steps enlarge.
# Products in float32 are TF32 on GPUs, with roundings of 2^-11.
EXACT, ROUNDED = 1e-4, 3e-2
STEPS, NEW, PROMPT = 4, 48, 16


def config_of(precision: PrecisionConfig, shape: dict, dispatch: str, cpu_devices: int) -> Config:
  return Config(
    model=ModelConfig(
      vocab_size=1000, d_model=512, num_layers=3, num_dense_layers=1, d_ff=1024, d_expert=256, num_experts=16, top_k=4,
      num_heads=8, kv_lora_rank=512, qk_nope_dim=128, qk_rope_dim=64, v_dim=128, mtp_depth=1,
    ),
    data=DataConfig(seq_len=256),
    train=TrainConfig(batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    precision=precision,
    dispatch=dispatch,
    mesh=MeshConfig(cpu_devices=cpu_devices, **shape),
  )  # fmt: skip


def meshes(devices: int) -> dict[str, tuple[dict, str]]:
  """Name -> (sizes of the axes, dispatch): one device, each axis alone, and two axes where there are devices for it."""
  found = {'one device': ({}, 'auto')}
  found |= {f'{axis} {devices}': ({axis: devices}, 'auto') for axis in ('data', 'tensor')}
  if devices % 2 == 0:
    found |= {'pipe 2': ({'pipe': 2, 'data': devices // 2}, 'auto')}
  found |= {f'expert {devices} {name}': ({'expert': devices}, name) for name in ('all_gather', 'all_to_all', 'ragged')}
  if devices % 4 == 0:
    half, pairs = devices // 2, (('data', 'expert'), ('data', 'tensor'), ('expert', 'tensor'))
    found |= {f'{first} {half} {second} 2': ({first: half, second: 2}, 'auto') for first, second in pairs}
  return found


def run(what: str, config: Config) -> dict:
  """What one job finds: {'losses': ...} or {'tokens': ...}."""
  if what == 'train':
    training = Training(config, random_tokens(config))
    return {'losses': [float(training()) for _ in range(STEPS)]}
  mesh = without_pipe(make_mesh(config))
  config = resolve(config, mesh, platform_of(mesh))
  made = state.create(config, mesh)
  if what == 'evaluate':
    token_BS = random_tokens(config)
    batch = {'token_BS': token_BS[None], 'segment_BS': np.ones_like(token_BS)[None]}
    sums = make_eval_step(config, mesh)(made.params, made.balance['bias_LE'], batch)
    return {'losses': (sums['nats'] / sums['predicted']).tolist()}
  ready = weights.prepare(made.params, made.balance['bias_LE'], config, mesh, 'fp8' if config.precision.fp8 else 'none')
  settings = Settings(config, Sampling(), eos_ids=(), capacity=PROMPT + NEW, drafts=int(what == 'draft'))
  prompts = np.random.default_rng(1).integers(0, config.model.vocab_size, (8, PROMPT)).tolist()
  completions, _ = generate.Generator(ready, settings, mesh, 8, PROMPT).run(prompts, NEW, range(8))
  return {'tokens': [completion.tokens for completion in completions]}


def child(shape: dict, dispatch: str, cpu_devices: int, jobs: list[str]) -> None:
  """Runs the jobs, a line of JSON each before it begins and when it is done."""
  setup_devices(MeshConfig(cpu_devices=cpu_devices))
  for job in jobs:
    what, name = JOBS[job]
    print(json.dumps({'begin': job}), flush=True)
    start = time.perf_counter()
    try:
      found = run(what, config_of(PRECISIONS[name], shape, dispatch, cpu_devices))
    except Exception as error:
      found = {'failed': f'{type(error).__name__}: {str(error).splitlines()[0][:120]}'}
    exact = JOBS[job][1] == 'float32' and jax.default_backend() == 'cpu'
    print(json.dumps({'job': job, 's': time.perf_counter() - start, 'exact': exact, **found}), flush=True)


def collect(mesh: str, cpu_devices: int, devices: int, jobs: list[str]) -> dict[str, dict]:
  """What each job found on the mesh; a job in which its process died has 'failed'."""
  found, left = {}, list(jobs)
  while left:
    command = [sys.executable, __file__, f'--mesh={mesh}', f'--cpu_devices={cpu_devices}', f'--devices={devices}']
    process = subprocess.Popen([*command, f'--jobs={",".join(left)}'], stdout=subprocess.PIPE, text=True)
    begun = None
    for line in process.stdout:
      row = json.loads(line)
      begun = row.get('begin')
      if not begun:
        found[row['job']] = row
        print(f'{mesh}: {row["job"]} {row.get("failed", "done")}, {row["s"]:.0f} s', file=sys.stderr, flush=True)
    code = process.wait()
    if begun or code:
      died = signal.Signals(-code).name if code < 0 else f'exit status {code}'
      found[begun or left[0]] = {'failed': f'the process ended: {died}', 's': 0.0}
    left = [job for job in left if job not in found]
  return found


def difference(row: dict, one: dict) -> tuple[str, bool]:
  """What to say of a job's row beside that of one device, and whether it is good."""
  if 'failed' in row:
    return row['failed'], False
  if 'losses' in row:
    text = ' '.join(f'{loss:.5f}' for loss in row['losses'])
    if 'losses' not in one:
      return text, bool(np.isfinite(row['losses']).all())
    off = np.abs(np.array(row['losses']) - one['losses']).max()
    return f'{text}, off by {off:.1e}', bool(off <= (EXACT if row['exact'] else ROUNDED))
  whole = all(len(tokens) == NEW for tokens in row['tokens'])
  if 'tokens' not in one:
    return f'{sum(map(len, row["tokens"]))} tokens', whole
  same = float(np.mean(np.array(row['tokens']) == np.array(one['tokens']))) if whole else 0.0
  # Untrained, the largest logits lie close together: only where sums are exact must it find the same tokens.
  return f'{same:.1%} of the tokens are those of one device', whole and (same == 1 or not row['exact'])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cpu_devices', type=int, default=0, help='virtual CPU devices; 0: what JAX finds')
  parser.add_argument('--devices', type=int, default=0, help='of the mesh; 0: all')
  parser.add_argument('--parallel', type=int, default=1, help='meshes at a time')
  parser.add_argument('--mesh', default='', help='run here, alone, and print JSON')
  parser.add_argument('--jobs', default=','.join(JOBS), help='some of: ' + ', '.join(JOBS))
  flags = parser.parse_args()
  jobs = flags.jobs.split(',')
  if flags.mesh:
    child(*meshes(flags.devices)[flags.mesh], flags.cpu_devices, jobs)
    return
  # Counted by another process, as a GPU's memory belongs to the first that uses it.
  count = [sys.executable, '-c', 'import jax; print(len(jax.devices()))']
  devices = flags.devices or flags.cpu_devices or int(subprocess.run(count, stdout=subprocess.PIPE, check=True).stdout)
  print(f'jax {jax.__version__}, {devices} devices', flush=True)
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # the models are small, and several share the devices
  bad, one, names = 0, {}, list(meshes(devices) if devices > 1 else ['one device'])
  with ThreadPoolExecutor(flags.parallel) as pool:
    of_meshes = pool.map(lambda mesh: collect(mesh, flags.cpu_devices, devices, jobs), names)
    for mesh, found in zip(names, of_meshes, strict=True):
      for job, row in found.items():
        text, good = difference(row, one.get(job, {}))
        bad += not good
        print(f'{mesh:20} {job:18} {"ok " if good else "BAD"} {row["s"]:5.1f} s  {text}', flush=True)
      one = one or found
  print(f'{bad} bad' if bad else 'all good')
  sys.exit(bool(bad))


if __name__ == '__main__':
  main()
