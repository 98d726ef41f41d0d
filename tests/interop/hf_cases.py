"""Tiny DeepSeek-V3 checkpoints as Hugging Face has them, written from the format's description without `moe.interop`.

`make_golden.py` shows them to transformers, the tests to us. All values come from a seed, so only logits are stored.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from heads import head
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from moe.model import transformer
from moe.parallel.mesh import BATCH_AXES
from moe.parallel.resolved import Resolved

BASE = {
  'architectures': ['DeepseekV3ForCausalLM'],
  'model_type': 'deepseek_v3',
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 12,
  'moe_intermediate_size': 6,
  'num_hidden_layers': 3,
  'first_k_dense_replace': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 2,
  'n_routed_experts': 8,
  'n_shared_experts': 1,
  'num_experts_per_tok': 3,
  'n_group': 1,
  'topk_group': 1,
  'norm_topk_prob': True,
  'routed_scaling_factor': 1.0,
  'q_lora_rank': None,
  'kv_lora_rank': 9,
  'qk_nope_head_dim': 6,
  'qk_rope_head_dim': 8,
  'v_head_dim': 5,
  'rope_theta': 10000.0,
  'rope_scaling': None,
  'rms_norm_eps': 1e-6,
  'hidden_act': 'silu',
  'attention_bias': False,
  'tie_word_embeddings': False,
  'max_position_embeddings': 256,
  'num_nextn_predict_layers': 0,
  'bos_token_id': 0,
  'eos_token_id': None,
}
# With 4 pairs, pair 0 is kept, pair 1 lies on the ramp, the others are slowed down.
YARN = {
  'type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 64,
  'beta_fast': 4.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
  'mscale_all_dim': 1.0,
}
GROUPS = {'n_group': 4, 'topk_group': 2, 'routed_scaling_factor': 2.5}
CASES = {
  'plain': {},
  'q_lora_groups': {'q_lora_rank': 7, **GROUPS},
  'yarn_mscale_3_dense': {
    'rope_scaling': {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707},
    'num_hidden_layers': 4,
    'first_k_dense_replace': 3,
    'n_group': 2,
  },
  'no_dense_unnormalised': {'first_k_dense_replace': 0, 'norm_topk_prob': False},
  'tied': {'tie_word_embeddings': True, 'q_lora_rank': 7},
  'two_shared_200_tokens': {'n_shared_experts': 2, 'vocab_size': 200, 'rope_theta': 500.0, **GROUPS},
  'moonlight': {'rms_norm_eps': 1e-5, 'n_shared_experts': 2, 'routed_scaling_factor': 2.446, 'rope_theta': 50000.0},
  'glm4_moe_lite': {
    'model_type': 'glm4_moe_lite',
    'architectures': ['Glm4MoeLiteForCausalLM'],
    'rms_norm_eps': 1e-5,
    'q_lora_rank': 7,
    'first_k_dense_replace': None,
    'mlp_layer_types': ['dense', 'dense', 'sparse'],
    'partial_rotary_factor': 1.0,
  },
  'deepseek_v2': {
    'model_type': 'deepseek_v2',
    'kv_lora_rank': 10,  # torch wants even strides
    'architectures': ['DeepseekV2ForCausalLM'],
    'scoring_func': 'softmax',
    'topk_method': 'greedy',
    'norm_topk_prob': False,
    'routed_scaling_factor': 1.7,
    'rope_scaling': {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707},
  },
  'mtp': {'num_nextn_predict_layers': 2, 'q_lora_rank': 7, 'rope_scaling': YARN, **GROUPS},
}


def fields_of(case: str) -> dict:
  """The case's config.json."""
  return BASE | CASES[case]


def shapes(hf: dict) -> dict[str, tuple[int, ...]]:
  """Every tensor of a checkpoint with this config.json."""
  D, V, layers = hf['hidden_size'], hf['vocab_size'], hf['num_hidden_layers']
  found = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not hf['tie_word_embeddings']:
    found['lm_head.weight'] = (V, D)
  first = hf['first_k_dense_replace']
  for number in range(layers + hf['num_nextn_predict_layers']):
    layer = _layer(hf, number >= first if first is not None else hf['mlp_layer_types'][number] == 'sparse')
    if number >= layers:
      layer |= {'enorm.weight': (D,), 'hnorm.weight': (D,), 'shared_head.norm.weight': (D,)}
      layer |= {'eh_proj.weight': (D, 2 * D), 'embed_tokens.weight': (V, D), 'shared_head.head.weight': (V, D)}
    found |= {f'model.layers.{number}.{name}': shape for name, shape in layer.items()}
  return found


def _layer(hf, has_experts):
  D, H, C, A = hf['hidden_size'], hf['num_attention_heads'], hf['kv_lora_rank'], hf['q_lora_rank']
  N, R, U = hf['qk_nope_head_dim'], hf['qk_rope_head_dim'], hf['v_head_dim']
  layer = {
    'input_layernorm.weight': (D,),
    'post_attention_layernorm.weight': (D,),
    'self_attn.kv_a_proj_with_mqa.weight': (C + R, D),
    'self_attn.kv_a_layernorm.weight': (C,),
    'self_attn.kv_b_proj.weight': (H * (N + U), C),
    'self_attn.o_proj.weight': (D, H * U),
  }
  if A:
    layer |= {'self_attn.q_a_proj.weight': (A, D), 'self_attn.q_a_layernorm.weight': (A,)}
    layer |= {'self_attn.q_b_proj.weight': (H * (N + R), A)}
  else:
    layer |= {'self_attn.q_proj.weight': (H * (N + R), D)}
  widths = {'mlp': hf['intermediate_size']}
  if has_experts:
    E, F = hf['n_routed_experts'], hf['moe_intermediate_size']
    layer |= {'mlp.gate.weight': (E, D)}
    if hf['model_type'] != 'deepseek_v2':
      layer |= {'mlp.gate.e_score_correction_bias': (E,)}
    widths = {f'mlp.experts.{expert}': F for expert in range(E)} | {'mlp.shared_experts': F * hf['n_shared_experts']}
  for name, width in widths.items():
    layer |= {f'{name}.gate_proj.weight': (width, D), f'{name}.up_proj.weight': (width, D)}
    layer |= {f'{name}.down_proj.weight': (D, width)}
  return layer


def weights(hf: dict) -> dict[str, np.ndarray]:
  """float32 values that make every part matter; biases of the router >= 0."""
  shape_of, values = shapes(hf), {}
  for name, shape in shape_of.items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith('e_score_correction_bias'):
      value = rng.uniform(0, 0.3, shape)
    else:
      value = 0.3 * rng.normal(size=shape) + (len(shape) == 1)  # the scales of norms lie around 1
    if hf['rms_norm_eps'] != 1e-6 and any(part in name for part in ('embed', '_a_proj')):
      value *= 0.01  # so that what is normed is so small that each norm's eps matters
    values[name] = value.astype(np.float32)
  for name in shape_of:  # what an MTP module shares with the model stands in the files again
    if name.endswith('.embed_tokens.weight'):
      values[name] = values['model.embed_tokens.weight']
    if name.endswith('.shared_head.head.weight'):
      values[name] = values.get('lm_head.weight', values['model.embed_tokens.weight'])
  return values


def write(folder, hf: dict, values: dict[str, np.ndarray]) -> None:
  """The checkpoint as one safetensors file."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(hf))
  save_file(values, folder / 'model.safetensors', metadata={'format': 'pt'})


def tokens(hf: dict, length: int = 20) -> np.ndarray:
  """int32 [2, length] token ids."""
  return np.random.default_rng(5).integers(0, hf['vocab_size'], (2, length)).astype(np.int32)


def our_logits(model, params, bias_LE, token_BS, mesh) -> np.ndarray:
  """float32 [1 + mtp_depth, B, S, vocabulary]: our model and its MTP modules on all but the last mtp_depth tokens."""
  config = Resolved(model=model, dispatch='local', grouped_matmul='ragged_dot', dropless=True)
  length = token_BS.shape[1] - model.mtp_depth

  def run(params, bias_LE, token_BS):
    built = transformer.build(config, params, bias_LE)
    segment_BS = jnp.ones_like(token_BS[:, :length])
    x_BSD = transformer.embed(built, token_BS[:, :length], segment_BS, config)
    h_BSD, _ = transformer.stack(built, x_BSD, segment_BS, segment_BS > 0, config)
    logits = [head(built, h_BSD, built.scale_out_D[...])]
    for depth, module in enumerate(built.mtp):
      next_BS = token_BS[:, depth + 1 : depth + 1 + length]
      h_BSD, _ = transformer.mtp_hidden(built, depth, h_BSD, next_BS, segment_BS, segment_BS > 0, config)
      logits.append(head(built, h_BSD, module.scale_out_D[...]))
    return jnp.stack(logits)

  specs = (P(), P(), P(BATCH_AXES))
  mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(None, BATCH_AXES, None, 'tensor'))
  return np.asarray(jax.jit(mapped)(params, bias_LE, token_BS))[..., : model.vocab_size]


def their_logits(folder, token_BS, mtp_depth: int = 0) -> np.ndarray:
  """The same of transformers' model in `folder`. Raises ValueError if it misses a tensor."""
  import torch
  from transformers import AutoModelForCausalLM

  model, info = AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation='eager',
    experts_implementation='eager',
    output_loading_info=True,
  )
  if info['missing_keys'] or info['mismatched_keys']:
    raise ValueError(f'{folder}: {info}')
  token_BS = torch.from_numpy(token_BS).long()
  length = token_BS.shape[1] - mtp_depth
  with torch.no_grad():
    main = model(token_BS[:, :length], use_cache=False, output_hidden_states=True)
    logits = [main.logits]
    if mtp_depth:
      logits += _their_mtp_logits(model, main.hidden_states[-1], token_BS, length)
  return torch.stack(logits).numpy()


def _their_mtp_logits(model, hidden_BSD, token_BS, length):
  """Each module's, on the hidden state that the one before it returns; MtpModel.forward drafts in the same order."""
  import torch
  from transformers.modeling_layers import MtpModel

  # Where MTP modules stand in a checkpoint is told by this list, which transformers has for 61 layers only.
  first = model.config.num_hidden_layers
  layers = range(first, first + model.config.num_mtp_layers)
  model._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.{number}\.' for number in layers]
  mtp, logits = MtpModel.from_pretrained(model), []
  position_BS = torch.arange(length)[None]
  mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
  for depth, layer in enumerate(mtp.layers):
    embedded_BSD = model.model.embed_tokens(token_BS[:, depth + 1 : depth + 1 + length])
    angles = model.model.rotary_emb(embedded_BSD, position_BS)
    hidden_BSD = layer(embedded_BSD, hidden_BSD, angles, mask, position_BS, None)
    logits.append(model.lm_head(hidden_BSD))
  return logits
