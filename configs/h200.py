"""A DeepSeek-V3 of the size that one H200 (141 GB) trains, on text of your own.

python experiments/train.py --config=configs/h200.py:data.paths=CORPUS --workdir=runs/h200

4.85e9 parameters, of which a token uses 0.77e9 besides the embedding lookup; 16,384 tokens a step. The state takes 8
bytes per parameter, 39 GB: float32 masters and bf16 moments. So much is a checkpoint, too, which is why there is one
at the end (and on SIGTERM) only.

No MTP module (model.mtp_depth=1 adds one): it is the shape that `experiments/bench.py --suite=step` runs against
Hugging Face's DeepseekV3ForCausalLM, which trains none.

Expect 76,000 tokens a second in bf16, 38% MFU and 70 GiB (bench.py --suite=step, on random tokens), and a minute to
compile, since the layers are unrolled. train.remat=dots takes 61 GiB and 71,000 tokens a second; with it,
precision.fp8=experts,ffn is 1.06 times as fast.
"""

from moe.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  PrecisionConfig,
  TrainConfig,
  to_config_dict,
)


def get_config(arg: str = ''):
  return to_config_dict(
    Config(
      model=ModelConfig(
        vocab_size=32768,
        d_model=2048,
        num_layers=12,
        num_dense_layers=1,
        d_ff=8192,
        d_expert=1024,
        num_experts=64,
        num_shared_experts=1,
        top_k=6,
        num_heads=16,
        q_lora_rank=0,
        kv_lora_rank=512,
        qk_nope_dim=128,
        qk_rope_dim=64,
        v_dim=128,
        mtp_depth=0,
        init_std=0.006,
      ),
      data=DataConfig(tokenizer='bpe', seq_len=2048),
      train=TrainConfig(steps=1000, batch_size=8, unroll_layers=11, eval_every=250, eval_sequences=64),
      optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=100, moments='bfloat16'),
      precision=PrecisionConfig(compute='bfloat16'),
      checkpoint=CheckpointConfig(every_steps=0, keep=1),
    ),
    arg,
  )
