"""The declared sweeps and the scales they run at, for experiments/ablate.py.

python experiments/ablate.py --sweep=balance --scale=tiny --workdir=runs/balance

A scale makes the config that all variants start from; a sweep makes a list of variants, and the report compares the
others with the first. A file of your own with the same two tables, SWEEPS and SCALES, goes with --definitions.
"""

from moe.config import (
  BalanceConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  PrecisionConfig,
  TrainConfig,
)
from moe.sweep.variants import Variant, axis, chain, named, product

NO_BIAS = {'balance.bias_rule': 'none'}
GAMMA = tuple(f'balance.gamma{part}' for part in ('', '_off_fraction', '_decay_fraction', '_final_fraction'))


def bias(rule: str) -> dict:
  """Balancing by a router bias alone."""
  return {'balance.bias_rule': rule}


def switch(alpha: float, scope: str = 'microbatch') -> dict:
  """Balancing by the Switch loss alone."""
  return NO_BIAS | {'balance.aux_loss': 'switch', 'balance.aux_alpha': alpha, 'balance.aux_scope': scope}


def sequence(alpha: float) -> dict:
  """Balancing by the sequence-wise loss alone."""
  return NO_BIAS | {'balance.aux_loss': 'sequence', 'balance.aux_alpha': alpha}


# ------------------------------------------------------------------------------------------------------------- sweeps


def balance() -> list[Variant]:
  """Ways to balance: the bias rules at one speed, auxiliary losses at several weights, and DeepSeek-V3's both."""
  rules = ('centered_sign', 'proportional', 'rms', 'quantile', 'smebu')
  v3 = bias('sign') | {'balance.aux_loss': 'sequence', 'balance.aux_alpha': 1e-4}
  return named(
    {'sign': bias('sign'), 'none': NO_BIAS}
    | {rule: bias(rule) for rule in rules}
    | {f'switch_{alpha}': switch(alpha) for alpha in (0.001, 0.01, 0.1)}
    | {'switch_global_0.01': switch(0.01, 'global_batch'), 'sequence_0.01': sequence(0.01), 'sign+sequence_0.0001': v3}
  )


def gamma() -> list[Variant]:
  """The sign rule's speed: constant, 0 in the end as in DeepSeek-V3 (the last 3.4%), or falling, to 0 or to a tenth."""
  speed = lambda gamma, off=0.0, decay=0.0, final=0.0: dict(zip(GAMMA, (gamma, off, decay, final), strict=True))
  constant = {f'gamma={gamma}': speed(gamma) for gamma in (1e-3, 1e-4, 3e-3, 1e-2)}
  falling = {f'gamma=0.003,to_{final}': speed(3e-3, 0.0, 0.2, final) for final in (0.0, 0.1)}
  return named(constant | {'gamma=0.001,then_0': speed(1e-3, 0.1)} | falling)


def scope() -> list[Variant]:
  """How many tokens the Switch loss counts loads over, all at the same batch.

  With m microbatches, the loss sees the loads of 1/m of the batch (scope microbatch), or those of this and the step's
  earlier microbatches (global_batch). The bias always counts the whole batch: sign at 1 and 8 microbatches should agree
  but for rounding, and shows how much that is.
  """
  parts = lambda *counts: axis('train.microbatches', counts)
  return chain(
    product(named({'switch': switch(0.01)}), parts(1, 2, 4, 8)),
    product(named({'switch_global': switch(0.01, 'global_batch')}), parts(8)),
    product(named({'sign': bias('sign')}), parts(1, 8)),
  )


def quantile() -> list[Variant]:
  """The quantile rule, slowed down with gamma or by a constant share of the old bias, against the sign rule."""
  falling = {'balance.gamma_decay_fraction': 0.4, 'balance.gamma_final_fraction': 0.05}
  constant = bias('quantile') | {'balance.gamma_decay_fraction': 0.0}
  kept = {f'quantile_ema={ema}': constant | {'balance.quantile_ema': ema} for ema in (0.0, 0.9, 0.99)}
  return named({'sign': bias('sign'), 'quantile_falling': bias('quantile') | falling} | kept)


def gate() -> list[Variant]:
  """Both scores of the router, with each way to balance (arXiv 2408.15664 compares them under both)."""
  return product(
    axis('model.score_fn', ('sigmoid', 'softmax')),
    named({'sign': bias('sign'), 'none': NO_BIAS, 'switch_0.01': switch(0.01)}),
  )


def capacity() -> list[Variant]:
  """Dropless against capacity factors with which training drops tokens; evaluation is dropless in all of them."""
  return product(
    chain(named({'dropless': {}}), axis('model.capacity_factor', (2.0, 1.25, 1.0))),
    named({'sign': bias('sign'), 'none': NO_BIAS, 'switch_0.01': switch(0.01)}),
  )


def fp8() -> list[Variant]:
  """FP8 with block scales against bf16, both balanced by the sign rule."""
  bf16 = bias('sign') | {'precision.compute': 'bfloat16'}
  modules = {'experts': 'experts', 'experts+ffn+attention': 'experts,ffn,attention'}
  return named({'bf16': bf16} | {f'fp8_{name}': bf16 | {'precision.fp8': policy} for name, policy in modules.items()})


SWEEPS = {
  'balance': balance,
  'gamma': gamma,
  'quantile': quantile,
  'scope': scope,
  'gate': gate,
  'capacity': capacity,
  'fp8': fp8,
}


# ------------------------------------------------------------------------------------------------------------- scales


def tiny() -> Config:
  """Two CPU cores, about a minute a run: 0.54e6 parameters, 16 experts, top-4, bytes of Python's standard library.

  The bias is fast (gamma 0.003), since there are but some hundred steps to balance in.
  """
  return Config(
    model=ModelConfig(
      d_model=64,
      num_layers=3,
      d_ff=192,
      d_expert=64,
      num_heads=2,
      kv_lora_rank=32,
      mtp_depth=0,
    ),
    balance=BalanceConfig(gamma=0.003),
    data=DataConfig(seq_len=128, val_fraction=0.004),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TrainConfig(steps=300, batch_size=16, microbatches=2, eval_every=100, eval_sequences=128, sample_tokens=0),
    checkpoint=CheckpointConfig(every_steps=100, keep=1),
  )


def h200() -> Config:
  """One H200, about 3 minutes a run: 0.57e9 parameters (0.09e9 active), 64 experts, top-6; 1,500 x 28,672 tokens.

  Give it more text than the 7.6e6 tokens of Python's standard library: --set=data.paths=..., such as what
  experiments/python_corpus.py makes. A step takes 0.09 s. The bias is fast first, or 1,500 steps would not do, and then
  slows down, since it would jitter. The learning rate falls to 0, as a router that still moves is off balance.
  """
  return Config(
    model=ModelConfig(
      vocab_size=16384,
      d_model=768,
      num_layers=10,
      d_ff=2048,
      d_expert=384,
      num_experts=64,
      num_shared_experts=2,
      top_k=6,
      num_heads=6,
      kv_lora_rank=256,
      qk_nope_dim=64,
      qk_rope_dim=32,
      v_dim=64,
      mtp_depth=0,
      init_std=0.006,
    ),
    balance=BalanceConfig(gamma=0.003, gamma_decay_fraction=0.4, gamma_final_fraction=0.05),
    data=DataConfig(tokenizer='bpe', seq_len=512, val_fraction=0.1),
    train=TrainConfig(
      steps=1500,
      batch_size=56,
      microbatches=2,
      unroll_layers=9,
      eval_every=500,
      eval_sequences=1024,
      sample_tokens=0,
    ),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=100, schedule='cosine', final_lr_fraction=0.0),
    precision=PrecisionConfig(compute='bfloat16'),
    checkpoint=CheckpointConfig(every_steps=0, keep=1),
  )


def smoke() -> Config:
  """Seconds a run: to see a sweep work from end to end. Its numbers mean nothing."""
  return Config(
    model=ModelConfig(
      d_model=16,
      num_layers=2,
      d_ff=16,
      d_expert=8,
      num_experts=8,
      top_k=2,
      num_heads=2,
      kv_lora_rank=8,
      qk_nope_dim=4,
      qk_rope_dim=4,
      v_dim=4,
      mtp_depth=0,
    ),
    balance=BalanceConfig(gamma=0.01),
    data=DataConfig(seq_len=32, val_fraction=0.001),
    optimizer=OptimizerConfig(warmup_steps=2),
    train=TrainConfig(steps=8, batch_size=8, microbatches=2, eval_every=4, sample_tokens=0),
    checkpoint=CheckpointConfig(every_steps=2, keep=1),
  )


SCALES = {'tiny': tiny, 'h200': h200, 'smoke': smoke}
