"""Which settings can run together, as far as that is known without devices or data: one line for what cannot."""

import re
from typing import TYPE_CHECKING

from moe.errors import UserError, short
from moe.files.paths import refuse_address
from moe.registry import ATTENTIONS, BIAS_RULES, DISPATCHERS, GROUPED_MATMULS

if TYPE_CHECKING:
  from moe.config import Config, ModelConfig

AUX_LOSSES = ('none', 'switch', 'sequence')
SCHEDULES = ('gpipe', '1f1b', 'zb_h1', 'dualpipe', 'dualpipe_v')  # of pipelines
FP8_MODULES = ('experts', 'ffn', 'attention', 'dispatch')
# Beyond these, a config is a mistake or an attack, and is refused before anything is traced. Of what there is, the
# deepest have 1,000 layers, and the largest some 1e12 parameters.
MOST_LAYERS, MOST_EXPERTS, MOST_PARAMETERS = 1024, 2**16, 10**13


def validate(config: 'Config') -> None:
  """Checks everything that can be known without devices or data. Raises UserError."""
  _validate_model(config.model)
  _validate_balance(config)
  _validate_paths(config)
  train, data, opt, mesh = config.train, config.data, config.optimizer, config.mesh
  at_least(train, 'train', 1, 'steps batch_size log_every unroll_layers')
  at_least(train, 'train', 0, 'microbatches seed mtp_weight load_every eval_every eval_sequences sample_tokens')
  one_of('train.logger', train.logger, ('none', 'wandb', 'mlflow'))
  one_of('train.schedule', train.schedule, SCHEDULES)
  one_of('train.remat', train.remat, ('none', 'dots', 'full'))
  _require(
    train.batch_size % max(train.microbatches, 1) == 0,
    f'config train.batch_size = {train.batch_size} must be divisible by train.microbatches = {train.microbatches}',
  )
  profile_range(train.profile_steps)
  utf8('config train.sample_prompt =', train.sample_prompt)
  _at_most(train, 'train', 100_000, 'sample_tokens')
  assignments = train.batch_size * data.seq_len * config.model.top_k
  _require(
    assignments < 2**31,
    f'config train.batch_size = {train.batch_size}, data.seq_len = {data.seq_len} and model.top_k = '
    f'{config.model.top_k} make {assignments} assignments a step; int32 counts them, up to {2**31 - 1}',
  )
  at_least(data, 'data', 2, 'seq_len')
  _require(
    data.seq_len > config.model.mtp_depth + 1,
    f'config data.seq_len = {data.seq_len} leaves no target for model.mtp_depth = {config.model.mtp_depth}',
  )
  _require(0 < data.val_fraction < 1, f'config data.val_fraction = {data.val_fraction} must be between 0 and 1')
  at_least(opt, 'optimizer', 0, 'learning_rate warmup_steps weight_decay clip_norm')
  at_least(opt, 'optimizer', 1e-18, 'eps')  # less: a gradient whose square is 0 in float32 is divided by next to 0
  _fraction(opt, 'optimizer', 'decay_fraction final_lr_fraction beta1 beta2')
  _at_most(opt, 'optimizer', 0.999999, 'beta1 beta2')  # more: 1 - beta is 0 in float32, and Adam divides by it
  one_of('optimizer.schedule', opt.schedule, ('wsd', 'cosine'))
  one_of('optimizer.moments', opt.moments, ('float32', 'bfloat16'))
  for module in config.precision.fp8_modules:
    one_of('precision.fp8', module, FP8_MODULES)
  one_of('precision.compute', config.precision.compute, ('float32', 'bfloat16'))
  one_of('precision.matmul', config.precision.matmul, ('default', 'highest'))
  at_least(mesh, 'mesh', 0, 'pipe data expert tensor cpu_devices process_id')
  at_least(mesh, 'mesh', 1, 'num_processes start_timeout_s')
  _at_most(mesh, 'mesh', 4096, 'cpu_devices')
  _require(
    mesh.process_id < mesh.num_processes,
    f'config mesh.process_id = {mesh.process_id} must be below mesh.num_processes = {mesh.num_processes}',
  )
  _require(
    (mesh.num_processes == 1) == (not mesh.coordinator),
    f'config mesh.num_processes = {mesh.num_processes} and mesh.coordinator = {mesh.coordinator!r} disagree: several '
    'processes need the host:port of process 0, one process needs none',
  )
  at_least(config.checkpoint, 'checkpoint', 0, 'every_steps')
  at_least(config.checkpoint, 'checkpoint', 1, 'keep')
  one_of('dispatch', config.dispatch, ('auto', *DISPATCHERS))
  one_of('grouped_matmul', config.grouped_matmul, ('auto', *GROUPED_MATMULS))


def _validate_model(model: 'ModelConfig'):
  at_least(model, 'model', 1, 'vocab_size d_model num_layers d_ff d_expert num_experts top_k num_groups top_groups')
  at_least(model, 'model', 1, 'num_heads v_dim yarn_original_len')
  at_least(model, 'model', 0, 'num_dense_layers num_shared_experts capacity_factor q_lora_rank qk_nope_dim mtp_depth')
  _require(
    model.num_dense_layers < model.num_layers,
    f'config model.num_dense_layers = {model.num_dense_layers} must be below model.num_layers = {model.num_layers}: '
    'at least one layer has experts',
  )
  _at_most(model, 'model', MOST_LAYERS, 'num_layers')
  _at_most(model, 'model', MOST_EXPERTS, 'num_experts num_shared_experts')
  _at_most(model, 'model', 64, 'mtp_depth')  # they are not scanned over: each is compiled
  one_of('model.score_fn', model.score_fn, ('sigmoid', 'softmax'))
  one_of('model.attention', model.attention, ATTENTIONS)
  _require(
    model.num_experts % model.num_groups == 0,
    f'config model.num_experts = {model.num_experts} must be divisible by model.num_groups = {model.num_groups}',
  )
  per_group = model.num_experts // model.num_groups
  _require(
    model.top_groups <= model.num_groups,
    f'config model.top_groups = {model.top_groups} must be at most model.num_groups = {model.num_groups}',
  )
  _require(
    model.num_groups == 1 or per_group >= 2,
    f'config model.num_groups = {model.num_groups} leaves {per_group} expert per group; group scores need 2 or more',
  )
  _require(
    model.top_k <= per_group * model.top_groups,
    f'config model.top_k = {model.top_k} is larger than the {per_group * model.top_groups} experts that '
    f'model.top_groups = {model.top_groups} of {model.num_groups} groups hold',
  )
  _require(
    model.qk_rope_dim >= 2 and model.qk_rope_dim % 2 == 0,
    f'config model.qk_rope_dim = {model.qk_rope_dim} must be even and at least 2',
  )
  ATTENTIONS[model.attention].check(model)
  _require(model.yarn_factor >= 1, f'config model.yarn_factor = {model.yarn_factor} must be at least 1')
  _require(
    model.yarn_beta_fast > model.yarn_beta_slow > 0,
    f'config model.yarn_beta_fast = {model.yarn_beta_fast} must be above model.yarn_beta_slow = '
    f'{model.yarn_beta_slow}, and both above 0',
  )
  for name, limit in (('rope_theta', 1), ('init_std', 0), ('route_scale', 0)):
    value = getattr(model, name)
    _require(value > limit, f'config model.{name} = {value} must be above {limit}')
  at_least(model, 'model', 1e-20, 'norm_eps')  # less: its power of -3/2, in the gradient of a row of zeros, is infinite
  at_least(model, 'model', 0, 'yarn_mscale')
  _at_most(model, 'model', 100, 'init_std yarn_mscale')
  size = parameters(model)
  _require(
    size <= MOST_PARAMETERS,
    f'the model of this config has {size:.3g} parameters; at most {MOST_PARAMETERS:.0e} are taken for no mistake',
  )


def parameters(model: 'ModelConfig') -> int:
  """How many parameters the model has, the padding of the vocabulary included, by arithmetic: nothing is traced."""
  D = model.d_model
  around = ATTENTIONS[model.attention].parameters(model) + 2 * D  # and two norms
  experts = (model.num_experts + model.num_shared_experts) * 3 * D * model.d_expert
  moe = around + experts + D * model.num_experts
  dense = around + 3 * D * model.d_ff
  mtp = moe + 3 * D + 2 * D * D
  ends = D + model.padded_vocab * D * (1 if model.tie_embeddings else 2)
  return model.num_dense_layers * dense + model.num_moe_layers * moe + model.mtp_depth * mtp + ends


def _validate_paths(config: 'Config'):
  data = config.data
  for path in data.paths.split(','):
    refuse_address(path, 'config data.paths')
  for name, path in (('data.tokenizer', data.tokenizer), ('data.cache_dir', data.cache_dir)):
    refuse_address(path, f'config {name}')
  refuse_address(config.train.init_from, 'config train.init_from')


def _validate_balance(config: 'Config'):
  balance = config.balance
  one_of('balance.bias_rule', balance.bias_rule, BIAS_RULES)
  one_of('balance.aux_loss', balance.aux_loss, AUX_LOSSES)
  one_of('balance.aux_scope', balance.aux_scope, ('microbatch', 'global_batch'))
  at_least(balance, 'balance', 0, 'gamma aux_alpha z_loss smebu_kappa')
  _at_most(balance, 'balance', 1000, 'gamma')  # scores lie between 0 and 1
  _fraction(balance, 'balance', 'gamma_off_fraction gamma_decay_fraction gamma_final_fraction smebu_beta quantile_ema')
  _require(
    balance.gamma_off_fraction + balance.gamma_decay_fraction <= 1,
    f'config balance.gamma_off_fraction = {balance.gamma_off_fraction} and balance.gamma_decay_fraction = '
    f'{balance.gamma_decay_fraction} must be at most 1 together: they follow each other',
  )
  _require(
    balance.quantile_ema < 1,
    f'config balance.quantile_ema = {balance.quantile_ema} must be below 1, or the bias would never move',
  )
  BIAS_RULES[balance.bias_rule].check(config)


def profile_range(text: str) -> range:
  """Steps of `train.profile_steps`: 'first:last', both included; '' is none. Raises UserError."""
  if not text:
    return range(0)
  first, _, last = text.partition(':')
  if not (re.fullmatch(r'\d{1,18}:\d{1,18}', text, re.ASCII) and int(first) <= int(last)):
    raise UserError(f"config train.profile_steps = {text!r} must look like '10:12' (first:last step) or be ''")
  return range(int(first), int(last) + 1)


def utf8(name: str, text: str) -> bytes:
  """The text, as tokenizers read it. Raises UserError if it has half a character: terminals and JSON may bring one."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{name} {short(text)} is not UTF-8: {error}') from error


def _require(ok: bool, message: str):
  if not ok:
    raise UserError(message)


def one_of(name: str, value: str, valid):
  _require(value in valid, f'config {name} = {value!r} must be one of {", ".join(valid)}')


def at_least(section, prefix: str, least: float, names: str) -> None:
  """Raises UserError unless all settings of these names are `least` or more.

  Args:
    section: of the config.
    prefix: what the section is called, for the message.
    least: the bound.
    names: of its fields, separated by blanks.
  """
  for name in names.split():
    value = getattr(section, name)
    _require(value >= least, f'config {prefix}.{name} = {value} must be at least {least}')


def _at_most(section, prefix: str, most: float, names: str):
  for name in names.split():
    value = getattr(section, name)
    _require(value <= most, f'config {prefix}.{name} = {value} must be at most {most}')


def _fraction(section, prefix: str, names: str):
  for name in names.split():
    value = getattr(section, name)
    _require(0 <= value <= 1, f'config {prefix}.{name} = {value} must be between 0 and 1')
