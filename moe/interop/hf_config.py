"""`config.json` of model type deepseek_v3 <-> our settings; what either side cannot represent is refused by name."""

import json
import math
from pathlib import Path

from moe.config import Config, ModelConfig, from_config_dict
from moe.errors import UserError

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
FIXED = {  # what the format may say and we do in one way only
  'model_type': 'deepseek_v3',
  'hidden_act': 'silu',
  'attention_bias': False,
  'scoring_func': 'sigmoid',
  'topk_method': 'noaux_tc',
  'moe_layer_freq': 1,
  'rope_interleave': True,
  'rms_norm_eps': 1e-6,  # transformers takes 1e-6 for the norms of the latents, whatever this says
}
MXFP4 = 'mxfp4-pack-quantized'
QUANTIZATION = {
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


def to_hf(config: Config, dtype: str, bos_id: int | None, quantize: str | None = None) -> dict:
  """The contents of config.json.

  Args:
    config: of the run.
    dtype: of the weights, 'bfloat16' or 'float32'.
    bos_id: token that starts a document; the model writes it to end one, so it is the end token as well.
    quantize: what `formats.kind_for` takes.

  Raises:
    UserError: a setting that the format has no place for.
  """
  model = config.model
  _refuse_unrepresentable(config)
  rope = _rope_to_hf(model)
  longest = round(model.yarn_original_len * model.yarn_factor) if rope else config.data.seq_len
  return {
    'architectures': ['DeepseekV3ForCausalLM'],
    **FIXED,
    **{theirs: getattr(model, ours) for theirs, ours in PLAIN.items()},
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
  }


def _refuse_unrepresentable(config):
  model, balance = config.model, config.balance
  per_group = model.num_experts // model.num_groups
  for field, value, ok, why in (
    ('model.attention', model.attention, model.attention == 'mla', 'the format has latent attention only'),
    ('model.score_fn', model.score_fn, model.score_fn == 'sigmoid', 'the format has sigmoid scores only'),
    ('model.norm_eps', model.norm_eps, model.norm_eps == 1e-6, 'readers take 1e-6 for the norms of the latents'),
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
  try:
    fields = json.loads(file.read_text('utf-8'))
  except FileNotFoundError:
    raise UserError(f'{folder} is not a Hugging Face checkpoint: it has no config.json') from None
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read {file}: {error}') from error
  found = fields.get('model_type') if isinstance(fields, dict) else None
  if found != FIXED['model_type']:
    raise UserError(f'{file} has model_type = {found!r}; only {FIXED["model_type"]!r} can be imported')
  return fields


def from_hf(fields: dict, file: Path) -> ModelConfig:
  """Our settings of the model that `fields`, read from `file`, describe.

  Raises:
    UserError: a field that is missing, of the wrong type, or asks for what we do not do.
  """
  for name, valid in FIXED.items():
    if fields.get(name, valid) not in (valid, None):
      raise UserError(f'{file} has {name} = {fields[name]!r}; only {valid!r} can be imported')
  if fields.get('num_key_value_heads') not in (None, fields.get('num_attention_heads')):
    raise UserError(
      f'{file} has num_key_value_heads = {fields["num_key_value_heads"]!r}; it must equal num_attention_heads'
    )
  _check_quantization(fields.get('quantization_config'), file)
  missing = [name for name in PLAIN if fields.get(name) is None]
  if missing:
    raise UserError(f'{file} lacks {missing[0]}')
  values = {ours: fields[theirs] for theirs, ours in PLAIN.items()}
  values |= {
    'q_lora_rank': fields.get('q_lora_rank') or 0,
    'mtp_depth': fields.get('num_nextn_predict_layers', fields.get('num_mtp_layers')) or 0,
    'tie_embeddings': fields.get('tie_word_embeddings') or False,
    'init_std': fields.get('initializer_range') or ModelConfig.init_std,
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
    raise UserError(
      f'{file} has quantization_config = {quantization!r}; only fp8 in blocks of 128x128 and {MXFP4} can be imported'
    )


def _rope_from_hf(fields, file):
  """The rotary settings, with the meaning that transformers gives to them."""
  rope = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
  if not isinstance(rope, dict):
    raise UserError(f'{file} has rope_scaling = {rope!r}, which is not a set of numbers')
  theta = rope.get('rope_theta', fields.get('rope_theta') or ModelConfig.rope_theta)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if rope.get('partial_rotary_factor', 1) != 1 or kind not in ('default', 'yarn'):
    raise UserError(f'{file} has rope_scaling = {rope!r}; only the types default and yarn can be imported')
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
  except (TypeError, ValueError, ZeroDivisionError) as error:
    raise UserError(f'{file} has rope_scaling = {rope!r}, which is not a set of numbers: {error}') from error
  if abs(on_sines - 1) > 1e-6:
    raise UserError(
      f'{file} has rope_scaling.mscale = {mscale} and mscale_all_dim = {all_dim}; only equal ones, above 0, can be '
      'imported'
    )
  if rope.get('truncate', True) is not True:
    raise UserError(f'{file} has rope_scaling.truncate = {rope["truncate"]!r}; only true can be imported')
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
