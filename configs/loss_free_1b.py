"""The 1B model of the loss-free balancing paper (arXiv 2408.15664, section 4.1 and appendix).

python experiments/train.py --config=configs/loss_free_1b.py:data.paths=CORPUS --workdir=runs/loss_free_1b

1.05e9 parameters, of which a token uses 0.20e9 besides the embedding lookup. Paper, 100B tokens: perplexity 9.50 and
MaxVio_global 0.04; with balance.bias_rule=none,balance.aux_loss=switch (alpha 0.001): 9.56 and 0.72.

The paper gives the expert width by its granularity only, d_ff / d_expert = 16/3. With the usual SwiGLU width d_ff =
8/3 d = 2731 that is 512, and the model has the 1B parameters of its name; the one dense layer takes 2736, the next
multiple of 16. Ours, for want of better knowledge: learning rate 1e-3, cosine schedule, 2000 warm-up steps.
"""

from moe.config import (
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
        vocab_size=32064,
        d_model=1024,
        num_layers=10,
        num_dense_layers=1,
        d_ff=2736,
        d_expert=512,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
        attention='mha',
        num_heads=8,
        qk_nope_dim=0,
        qk_rope_dim=128,
        v_dim=128,
        mtp_depth=0,
        init_std=0.006,
      ),
      data=DataConfig(tokenizer='bpe', seq_len=2048),
      train=TrainConfig(steps=42386, batch_size=1152, microbatches=9, remat='full', eval_every=1000),
      optimizer=OptimizerConfig(learning_rate=1e-3, schedule='cosine', warmup_steps=2000),
      precision=PrecisionConfig(compute='bfloat16'),
      mesh=MeshConfig(preset='h20x16_ep'),
    ),
    arg,
  )
