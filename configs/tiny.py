"""A small DeepSeek-V3 on the source text of Python's standard library, for a laptop CPU.

python experiments/train.py --config=configs/tiny.py --workdir=runs/tiny
"""

from moe.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, to_config_dict


def get_config(arg: str = ''):
  return to_config_dict(
    Config(
      model=ModelConfig(
        vocab_size=257,
        d_model=128,
        num_layers=3,
        num_dense_layers=1,
        d_ff=384,
        d_expert=128,
        num_experts=16,
        num_shared_experts=1,
        top_k=4,
        num_heads=4,
        kv_lora_rank=64,
        qk_nope_dim=32,
        qk_rope_dim=16,
        v_dim=32,
        mtp_depth=1,
      ),
      balance=BalanceConfig(gamma=0.003),
      data=DataConfig(seq_len=128, val_fraction=0.01),
      optimizer=OptimizerConfig(learning_rate=3e-3),
      train=TrainConfig(steps=400, batch_size=16, eval_every=200, eval_sequences=512),
    ),
    arg,
  )
