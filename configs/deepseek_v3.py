"""DeepSeek-V3 671B (arXiv 2412.19437, sections 4.1-4.2 and config_671B.json of the released inference code).

python experiments/train.py --config=configs/deepseek_v3.py:data.paths=CORPUS --workdir=runs/deepseek_v3

Parameters without the MTP module (model.mtp_depth=0): 671.03e9, of which a token uses 36.63e9 besides the embedding
lookup; the MTP module adds 11.61e9, embedding and head shared. Nothing near 16 GPUs holds it: the file is for counting,
planning and lowering, and `h20x16_ep` stands for a mesh of the reader's. tests/test_lowering.py lowers its train step
for 2048 GPUs.

What differs from the paper's run: batch 15360 from the start (there: from 3072, over the first 469B tokens), so that
14.8T tokens are 235240 steps; the learning rate falls linearly, not as a cosine, over the last 4.8T; mtp_weight stays
at 0.3 (there: 0.1 after 10T); YaRN is on as in the released checkpoint (there: off while training at length 4096).
"""

from moe.config import (
  BalanceConfig,
  Config,
  DataConfig,
  MeshConfig,
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
        vocab_size=129280,
        d_model=7168,
        num_layers=61,
        num_dense_layers=3,
        d_ff=18432,
        d_expert=2048,
        num_experts=256,
        num_shared_experts=1,
        top_k=8,
        num_groups=8,
        top_groups=4,
        route_scale=2.5,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_dim=128,
        qk_rope_dim=64,
        v_dim=128,
        yarn_factor=40.0,
        mtp_depth=1,
        init_std=0.006,
      ),
      balance=BalanceConfig(gamma_off_fraction=0.034, aux_loss='sequence', aux_alpha=1e-4),
      data=DataConfig(tokenizer='bpe', seq_len=4096),
      train=TrainConfig(steps=235240, batch_size=15360, microbatches=960, remat='full', eval_every=1000),
      optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000, decay_fraction=0.324, moments='bfloat16'),
      precision=PrecisionConfig(compute='bfloat16'),
      mesh=MeshConfig(preset='h20x16_ep'),
    ),
    arg,
  )
