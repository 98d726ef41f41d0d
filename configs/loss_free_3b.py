"""The 3B model of the loss-free balancing paper (arXiv 2408.15664, section 4.1 and appendix).

python experiments/train.py --config=configs/loss_free_3b.py:data.paths=CORPUS --workdir=runs/loss_free_3b

3.03e9 parameters, of which a token uses 0.48e9 besides the embedding lookup. Paper, 200B tokens: perplexity 7.92 and
MaxVio_global 0.04; with balance.bias_rule=none,balance.aux_loss=switch (alpha 0.001): 7.97 and 0.52.

The paper gives the expert width by its granularity only, d_ff / d_expert = 4. Width 1024 beside a dense layer of 4096
gives the 3B parameters of the model's name (the 1B model's rule, d_ff = 8/3 d, would give width 853 and 2.55e9). The
learning rate, 7.8e-4, is the paper's; cosine schedule and 2000 warm-up steps are ours, for want of better knowledge.
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
        d_model=1280,
        num_layers=12,
        num_dense_layers=1,
        d_ff=4096,
        d_expert=1024,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
        attention='mha',
        num_heads=10,
        qk_nope_dim=0,
        qk_rope_dim=128,
        v_dim=128,
        mtp_depth=0,
        init_std=0.006,
      ),
      data=DataConfig(tokenizer='bpe', seq_len=2048),
      train=TrainConfig(steps=56514, batch_size=1728, microbatches=27, remat='full', eval_every=1000),
      optimizer=OptimizerConfig(learning_rate=7.8e-4, schedule='cosine', warmup_steps=2000),
      precision=PrecisionConfig(compute='bfloat16'),
      mesh=MeshConfig(preset='h20x16_ep'),
    ),
    arg,
  )
