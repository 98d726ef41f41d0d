"""`config.json` of a DeepSeek-V3 model <-> our settings; what either side cannot represent is refused by name."""

import math
import os
from pathlib import Path
from typing import Any

from moe.config import Config, ModelConfig, from_config_dict
from moe.errors import UserError, short
from moe.files import read_json

PLAIN = {  # theirs: ours, the same number
  'vocab_size': 'vocab_size',
  'hidden_size': 'd_model',
  'num_hidden_layers': 'num_layers',
  'first_k_dense_replace': 'num_dense_layers',
  'intermediate_size': 'd_ff',
  'moe_intermediate_size': 'd_expert',
  'n_routed_experts': 'num_experts',
  'n_shared_experts': 'num_shared_experts',
  'num_experts_per_tok': 'top_k',
  'n_group': 'num_groups',
  'topk_group': 'top_groups',
  'norm_topk_prob': 'normalize_gates',
  'routed_scaling_factor': 'route_scale',
  'num_attention_heads': 'num_heads',
  'kv_lora_rank': 'kv_lora_rank',
  'qk_nope_head_dim': 'qk_nope_dim',
  'qk_rope_head_dim': 'qk_rope_dim',
  'v_head_dim': 'v_dim',
}
SIDES = (  # that tensors' sizes are made of
  *('d_ff', 'd_expert', 'num_shared_experts', 'num_heads', 'q_lora_rank'),
  *('kv_lora_rank', 'qk_nope_dim', 'qk_rope_dim', 'v_dim'),
)
FIXED: dict[str, Any] = {  # what the format may say and we do in one way only
  'hidden_act': 'silu',
  'attention_bias': False,
  'moe_layer_freq': 1,
  'rope_interleave': True,
  'partial_rotary_factor': 1.0,
}
V2, V3 = 'deepseek_v2', 'deepseek_v3'
ROUTERS: dict[str, dict[str, Any]] = {  # by model type; V2 has neither bias nor groups, and says so by its method
  V2: {'scoring_func': 'softmax', 'topk_method': 'greedy', 'norm_topk_prob': False},
  V3: {'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc'},
}
# The same mathematics and names of tensors: Kimi K2, GLM-4.7-Flash, Sarvam's larger model.
SAME_AS = {V2: V2, V3: V3, 'kimi_k2': V3, 'glm4_moe_lite': V3, 'sarvam_mla': V3}
MXFP4 = 'mxfp4-pack-quantized'
QUANTIZATION: dict[str, dict[str, Any]] = {
  # As DeepSeek-V3's config.json has it.
  'fp8': {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8', 'weight_block_size': [128, 128]},
  # As moonshotai/Kimi-K3's config.json has it, whose routed experts are MXFP4 too. Patterns are matched with modules'
  # names; no activation is quantised.
  'mxfp4': {
    'quant_method': 'compressed-tensors',
    'format': MXFP4,
    'quantization_status': 'compressed',
    'config_groups': {
      'group_0': {
        'format': MXFP4,
        'targets': ['Linear'],
        'weights': {
          'num_bits': 4,
          'type': 'float',
          'symmetric': True,
          'strategy': 'group',
          'group_size': 32,
          'dynamic': False,
          'scale_dtype': 'torch.uint8',
        },
        'input_activations': None,
        'output_activations': None,
      }
    },
    'ignore': [
      're:.*self_attn.*',
      're:.*shared_experts.*',
      r're:.*mlp\.(gate|up|gate_up|down)_proj.*',
      r're:.*mlp\.gate$',
      're:.*eh_proj.*',
      're:.*shared_head.*',
      're:.*lm_head.*',
    ],
  },
}


def theirs(ours: str) -> str:
  """The name in config.json of a field of ModelConfig that is a number."""
  others = {'q_lora_rank': 'q_lora_rank', 'mtp_depth': 'num_nextn_predict_layers'}
  return (others | {name: key for key, name in PLAIN.items()})[ours]


def to_hf(
  config: Config, dtype: str, bos_id: int | None, quantize: str | None = None, kept: dict | None = None
) -> dict:
  """The contents of config.json.

  Args:
    config: of the run.
    dtype: of the weights, 'bfloat16' or 'float32'.
    bos_id: token that starts a document; the model writes it to end one, so it is the end token as well.
    quantize: what `formats.kind_for` takes.
    kept: fields that are known better, such as those of the folder that the run was imported from.

  Raises:
    UserError: a setting that the format has no place for.
  """
  model = config.model
  _refuse_unrepresentable(config)
  kind = V2 if model.score_fn == 'softmax' else V3
  rope = _rope_to_hf(model)
  longest = round(model.yarn_original_len * model.yarn_factor) if rope else config.data.seq_len
  return {
    'architectures': [{V2: 'DeepseekV2ForCausalLM', V3: 'DeepseekV3ForCausalLM'}[kind]],
    'model_type': kind,
    **FIXED,
    **ROUTERS[kind],
    **{theirs: getattr(model, ours) for theirs, ours in PLAIN.items()},
    'rms_norm_eps': model.norm_eps,
    'q_lora_rank': model.q_lora_rank or None,
    'num_key_value_heads': model.num_heads,
    'num_nextn_predict_layers': model.mtp_depth,
    'tie_word_embeddings': model.tie_embeddings,
    'initializer_range': model.init_std,
    'max_position_embeddings': longest,
    'rope_theta': model.rope_theta,
    'rope_scaling': rope,
    # The two lines above as transformers 5 spells them; vLLM, SGLang and transformers 4 read the old ones.
    'rope_parameters': (rope or {'rope_type': 'default'}) | {'rope_theta': model.rope_theta},
    'bos_token_id': bos_id,
    'eos_token_id': bos_id,  # without it transformers takes token 1
    'torch_dtype': dtype,
    **({'quantization_config': QUANTIZATION[quantize]} if quantize else {}),
    **(kept or {}),
  }


def _refuse_unrepresentable(config):
  model, balance = config.model, config.balance
  per_group = model.num_experts // model.num_groups
  is_v2 = not (model.normalize_gates or model.num_groups > 1 or model.mtp_depth)
  for field, value, ok, why in (
    ('model.attention', model.attention, model.attention == 'mla', 'the format has latent attention only'),
    (
      'model.score_fn',
      model.score_fn,
      model.score_fn == 'sigmoid' or is_v2,
      'DeepSeek-V2, which has softmax scores, has no groups, normalised gates or MTP modules',
    ),
    ('model.num_experts', model.num_experts, per_group >= 2, 'readers add up the two best experts of a group'),
    (
      'model.num_shared_experts',
      model.num_shared_experts,
      model.num_shared_experts > 0,
      'readers expect at least one shared expert',
    ),
    (
      'balance.bias_rule',
      balance.bias_rule,
      balance.bias_rule != 'multiplicative',
      'the format adds the bias to the scores',
    ),
  ):
    if not ok:
      raise UserError(f'config {field} = {value!r} cannot be exported: {why}')


def _rope_to_hf(model):
  if model.yarn_factor == 1:
    return None
  return {
    'type': 'yarn',
    'rope_type': 'yarn',
    'factor': model.yarn_factor,
    'original_max_position_embeddings': model.yarn_original_len,
    'beta_fast': model.yarn_beta_fast,
    'beta_slow': model.yarn_beta_slow,
    # The softmax scale is multiplied by (0.1 * mscale_all_dim * ln(factor) + 1)^2, sines and cosines by the quotient of
    # the same term (not squared) for mscale and for mscale_all_dim. From mscale = 0 transformers derives another
    # quotient unless attention_factor names it. vLLM, if that is 1, leaves the softmax scale alone: right for 0 only.
    'mscale': model.yarn_mscale,
    'mscale_all_dim': model.yarn_mscale,
    **({} if model.yarn_mscale else {'attention_factor': 1.0}),
  }


def read(folder: Path) -> dict:
  """config.json of a folder. Raises UserError if that is not a DeepSeek-V3 checkpoint's."""
  file = folder / 'config.json'
  if not os.path.lexists(file):
    raise UserError(f'{folder} is not a Hugging Face checkpoint: it has no config.json')
  fields = read_json(file)
  found = fields.get('model_type')
  if not isinstance(found, str) or found not in SAME_AS:
    raise UserError(f'{file} has model_type = {short(found)}; only {", ".join(SAME_AS)} can be imported')
  return fields


def from_hf(fields: dict, file: Path) -> ModelConfig:
  """Our settings of the model that `fields`, read from `file`, describe.

  Raises:
    UserError: a field that is missing, of the wrong type, or asks for what we do not do.
  """
  kind = SAME_AS[fields['model_type']]
  for name, valid in (FIXED | ROUTERS[kind]).items():
    if fields.get(name, valid) not in (valid, None):
      raise UserError(f'{file} has {name} = {short(fields[name])}; only {valid!r} can be imported')
  heads = fields.get('num_key_value_heads')
  if heads not in (None, fields.get('num_attention_heads')):
    raise UserError(f'{file} has num_key_value_heads = {short(heads)}; it must equal num_attention_heads')
  _check_quantization(fields.get('quantization_config'), file)
  longest = fields.get('max_position_embeddings')
  if longest is not None and not (type(longest) is int and longest > 1):
    raise UserError(f'{file} has max_position_embeddings = {short(longest)}; it must be a number of tokens')
  if kind == V2:
    fields = fields | {'n_group': 1, 'topk_group': 1, 'norm_topk_prob': False}
  fields = _dense_layers(fields, file)
  missing = [name for name in PLAIN if fields.get(name) is None]
  if missing:
    raise UserError(f'{file} lacks {missing[0]}')
  values = {ours: fields[theirs] for theirs, ours in PLAIN.items()}
  values |= {
    'q_lora_rank': fields.get('q_lora_rank') or 0,
    'mtp_depth': fields.get('num_nextn_predict_layers', fields.get('num_mtp_layers')) or 0,
    'tie_embeddings': fields.get('tie_word_embeddings') or False,
    'init_std': fields.get('initializer_range') or ModelConfig.init_std,
    'norm_eps': fields.get('rms_norm_eps') or ModelConfig.norm_eps,
    'score_fn': ROUTERS[kind]['scoring_func'],
    'attention': 'mla',
    **_rope_from_hf(fields, file),
  }
  try:
    model = from_config_dict({'model': values}).model
    if model.num_shared_experts < 1:
      raise UserError('config model.num_shared_experts = 0 must be at least 1')
    return model
  except UserError as error:
    raise UserError(f'{file}: {error}') from error


def _dense_layers(fields, file):
  """`fields` with first_k_dense_replace, which transformers 5 writes as a list of every layer's kind for some types."""
  kinds = fields.get('mlp_layer_types')
  if kinds is None or fields.get('first_k_dense_replace') is not None:
    return fields
  first = kinds.index('sparse') if isinstance(kinds, list) and 'sparse' in kinds else 0
  if kinds != ['dense'] * first + ['sparse'] * (len(kinds) - first) or len(kinds) != fields.get('num_hidden_layers'):
    raise UserError(f"{file} has mlp_layer_types = {short(kinds)}; only 'dense' layers before 'sparse' can be imported")
  return fields | {'first_k_dense_replace': first}


def _check_quantization(quantization, file):
  """What a weight is stored as, its tensors say; this is about what they mean."""
  if not quantization:
    return
  try:
    method = quantization['quant_method']
    if method == 'fp8':
      known = quantization['weight_block_size'] == QUANTIZATION['fp8']['weight_block_size']
    else:
      weights = [group['weights'] for group in quantization['config_groups'].values()]
      wanted = QUANTIZATION['mxfp4']['config_groups']['group_0']['weights']
      facts = ('num_bits', 'type', 'symmetric', 'group_size')
      known = method == 'compressed-tensors' and all(one[fact] == wanted[fact] for one in weights for fact in facts)
  except (KeyError, TypeError, AttributeError):
    known = False
  if not known:
    groups = quantization.get('config_groups') if isinstance(quantization, dict) else None
    name, value = ('quantization_config.config_groups', groups) if groups else ('quantization_config', quantization)
    raise UserError(f'{file} has {name} = {short(value)}; only fp8 in blocks of 128x128 and {MXFP4} can be imported')


def _rope_from_hf(fields, file):
  """The rotary settings, with the meaning that transformers gives to them."""
  rope = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
  if not isinstance(rope, dict):
    raise UserError(f'{file} has rope_scaling = {short(rope)}, which is not a set of numbers')
  theta = rope.get('rope_theta', fields.get('rope_theta') or ModelConfig.rope_theta)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if rope.get('partial_rotary_factor', 1) != 1 or kind not in ('default', 'yarn'):
    raise UserError(f'{file} has rope_scaling = {short(rope)}; only the types default and yarn can be imported')
  if kind == 'default':
    return {'rope_theta': theta}
  longest = fields.get('max_position_embeddings')
  original = rope.get('original_max_position_embeddings', longest)
  try:
    factor = float(rope.get('factor') or longest / original)
    mscale, all_dim = float(rope.get('mscale') or 0), float(rope.get('mscale_all_dim') or 0)
    on_sines = rope.get('attention_factor')
    if on_sines is None:
      on_sines = _term(factor, mscale) / _term(factor, all_dim) if mscale and all_dim else _term(factor, 1)
    on_sines = float(on_sines)
  except (TypeError, ValueError, ArithmeticError) as error:  # an integer may be larger than any float
    raise UserError(f'{file} has rope_scaling = {short(rope)}, which is not a set of numbers: {error}') from error
  if abs(on_sines - 1) > 1e-6:
    raise UserError(
      f'{file} has rope_scaling.mscale = {mscale} and mscale_all_dim = {all_dim}; only equal ones, above 0, can be '
      'imported'
    )
  if rope.get('truncate', True) is not True:
    raise UserError(f'{file} has rope_scaling.truncate = {short(rope["truncate"])}; only true can be imported')
  return {
    'rope_theta': theta,
    'yarn_factor': factor,
    'yarn_original_len': original,
    'yarn_beta_fast': rope.get('beta_fast') or ModelConfig.yarn_beta_fast,
    'yarn_beta_slow': rope.get('beta_slow') or ModelConfig.yarn_beta_slow,
    'yarn_mscale': all_dim,
  }


def _term(factor, mscale):
  return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
