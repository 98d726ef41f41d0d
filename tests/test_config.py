"""Every rule of the config: what is rejected, with which words, and what comes back unchanged."""

import dataclasses
import math
import re

import ml_collections
import pytest

from moe.config import Config, DataConfig, ModelConfig, from_config_dict, to_config_dict
from moe.errors import MOST_CHARACTERS, UserError, one_line
from moe.validation import profile_range


def changed(overrides):
  """The default config dict with some dotted keys replaced."""
  config_dict = to_config_dict(Config())
  with config_dict.ignore_type():
    config_dict.update_from_flattened_dict(overrides)
  return config_dict


def fields(cls=Config, prefix=''):
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from fields(field.type, prefix + field.name + '.')
    else:
      yield prefix + field.name, field.type, field.default


# -------------------------------------------------------------------------------------------------------- round trip

# A value that differs from the default for every setting, valid together with all others.
OTHER = {
  'model.vocab_size': 1000,
  'model.d_model': 64,
  'model.num_layers': 6,
  'model.num_dense_layers': 2,
  'model.d_ff': 96,
  'model.d_expert': 32,
  'model.num_experts': 32,
  'model.num_shared_experts': 0,
  'model.top_k': 3,
  'model.num_groups': 8,
  'model.top_groups': 3,
  'model.score_fn': 'softmax',
  'model.normalize_gates': False,
  'model.route_scale': 2.5,
  'model.capacity_factor': 1.25,
  'model.attention': 'mha',
  'model.num_heads': 8,
  'model.q_lora_rank': 0,
  'model.kv_lora_rank': 32,
  'model.qk_nope_dim': 0,
  'model.qk_rope_dim': 8,
  'model.v_dim': 16,
  'model.rope_theta': 500000.0,
  'model.yarn_factor': 8.0,
  'model.yarn_original_len': 512,
  'model.yarn_beta_fast': 16.0,
  'model.yarn_beta_slow': 2.0,
  'model.yarn_mscale': 0.7,
  'model.mtp_depth': 0,
  'model.tie_embeddings': True,
  'model.norm_eps': 1e-5,
  'model.init_std': 0.006,
}
SAME_AS_DEFAULT = {'model.q_lora_rank'}  # mha allows no other


def test_round_trip_of_defaults():
  assert from_config_dict(to_config_dict(Config())) == Config()


def test_round_trip_of_every_model_setting():
  config = from_config_dict(changed(OTHER))
  assert dataclasses.asdict(config.model) == {key.removeprefix('model.'): value for key, value in OTHER.items()}
  assert from_config_dict(to_config_dict(config)) == config
  unchanged = {name for name, _, default in fields(ModelConfig, 'model.') if OTHER[name] == default}
  assert unchanged == SAME_AS_DEFAULT


def test_a_plain_dict_with_some_keys_is_enough():
  config = from_config_dict({'model': {'top_k': 2}, 'dispatch': 'local'})
  assert config == Config(model=ModelConfig(top_k=2), dispatch='local')


def test_integers_become_floats():
  rate = from_config_dict(changed({'optimizer.learning_rate': 1})).optimizer.learning_rate
  assert isinstance(rate, float)
  assert rate == 1


@pytest.mark.parametrize(
  ('dense', 'mtp', 'vocab', 'expected'), [(1, 1, 257, (3, 4, 384)), (0, 0, 256, (4, 4, 256)), (3, 2, 1, (1, 3, 128))]
)
def test_derived_sizes(dense, mtp, vocab, expected):
  model = ModelConfig(num_layers=4, num_dense_layers=dense, mtp_depth=mtp, vocab_size=vocab)
  assert (model.num_moe_layers, model.num_routers, model.padded_vocab) == expected


# ----------------------------------------------------------------------------------------------- command-line argument


def test_argument_overrides():
  arg = 'train.seed=3,balance.bias_rule=none,optimizer.learning_rate=2e-4,model.tie_embeddings=true,dispatch=local'
  config = from_config_dict(to_config_dict(Config(), arg))
  assert (config.train.seed, config.balance.bias_rule, config.optimizer.learning_rate) == (3, 'none', 2e-4)
  assert config.model.tie_embeddings is True
  assert config.dispatch == 'local'
  assert to_config_dict(Config(), '') == to_config_dict(Config())


def test_argument_values_may_hold_equals_signs():
  assert to_config_dict(Config(), 'train.sample_prompt=x = ').train.sample_prompt == 'x = '


@pytest.mark.parametrize(
  ('arg', 'fragment'),
  [
    (
      'train.sed=3',
      "config argument 'train.sed=3': unknown setting 'train.sed'; the nearest valid one is 'train.seed'",
    ),
    ('trian.seed=3', "unknown setting 'trian.seed'; the nearest valid one is 'train.seed'"),
    ('train.seed.more=3', "unknown setting 'train.seed.more'"),
    ('train.seed', 'must look like train.seed=3'),
    ('train=3', 'must look like train.seed=3'),
    ('train.seed=three', "config train.seed = 'three' must be of type int"),
    ('train.seed=1.5', "config train.seed = '1.5' must be of type int"),
    ('optimizer.learning_rate=fast', "config optimizer.learning_rate = 'fast' must be of type float"),
    ('model.tie_embeddings=yes', "model.tie_embeddings = 'yes' must be one of true, false"),
  ],
)
def test_bad_arguments(arg, fragment):
  with pytest.raises(UserError, match=re.escape(fragment)):
    to_config_dict(Config(), arg)


# --------------------------------------------------------------------------------------------------- keys and types


@pytest.mark.parametrize(
  ('values', 'fragment'),
  [
    ({'modle': {}}, "unknown config key 'modle'; the nearest valid one is 'model'"),
    (
      {'model': {'num_expert': 8}},
      "unknown config key 'model.num_expert'; the nearest valid one is 'model.num_experts'",
    ),
    ({'train': {'sede': 8}}, "unknown config key 'train.sede'; the nearest valid one is 'train.seed'"),
    ({'train': {'': 8}}, "unknown config key 'train.'; the nearest valid one is 'train."),
    ({'train': 3}, 'config train is a section and cannot be set to 3'),
  ],
)
def test_unknown_keys(values, fragment):
  with pytest.raises(UserError, match=re.escape(fragment)):
    from_config_dict(values)


@pytest.mark.parametrize(('name', 'kind'), [(name, kind) for name, kind, _ in fields()])
def test_wrong_types(name, kind):
  section, _, key = name.rpartition('.')
  for wrong in {int: [1.5, '1', True, None], float: ['1', True, None], str: [1, None], bool: [1, 'true']}[kind]:
    # A plain dict: a ConfigDict turns a bool into a float by itself.
    values = {section: {key: wrong}} if section else {key: wrong}
    with pytest.raises(UserError, match=rf'config {name} = .* has type \w+; it must be of type {kind.__name__}'):
      from_config_dict(values)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 10**400], ids=['nan', 'inf', 'no_float_is_so_large'])
def test_numbers_are_finite(value):
  with pytest.raises(UserError, match=r'optimizer.learning_rate = .* must be a finite number'):
    from_config_dict({'optimizer': {'learning_rate': value}})


# ------------------------------------------------------------------------------------------------------------- values

MHA = {'model.attention': 'mha', 'model.qk_nope_dim': 0}
ONE_OF = {
  'model.score_fn': ('sigmoid', 'softmax'),
  'model.attention': ('mla',),  # mha needs more changes
  'balance.bias_rule': ('none', 'sign', 'centered_sign', 'proportional', 'rms', 'multiplicative', 'smebu', 'quantile'),
  'balance.aux_loss': ('none', 'switch', 'sequence'),
  'balance.aux_scope': ('microbatch', 'global_batch'),
  'train.remat': ('none', 'dots', 'full'),
  'train.schedule': ('gpipe', '1f1b', 'zb_h1', 'dualpipe', 'dualpipe_v'),
  'optimizer.schedule': ('wsd', 'cosine'),
  'optimizer.moments': ('float32', 'bfloat16'),
  'precision.compute': ('float32', 'bfloat16'),
  'precision.fp8': ('', 'experts', 'ffn', 'experts,ffn'),
  'precision.matmul': ('default', 'highest'),
  'dispatch': ('auto', 'local', 'all_gather', 'all_to_all', 'ragged'),
  'grouped_matmul': ('auto', 'blocked', 'mosaic_gpu', 'ragged_dot'),
}
LEAST = {
  1: 'model.vocab_size model.d_model model.num_layers model.d_ff model.d_expert model.num_experts model.top_k '
  'model.num_groups model.top_groups model.num_heads model.v_dim model.yarn_original_len model.kv_lora_rank '
  'model.qk_nope_dim train.steps train.batch_size train.log_every mesh.num_processes '
  'checkpoint.keep model.yarn_factor',
  0: 'model.num_dense_layers model.num_shared_experts model.capacity_factor model.q_lora_rank model.mtp_depth '
  'balance.gamma balance.aux_alpha balance.z_loss balance.smebu_kappa train.microbatches train.seed train.mtp_weight '
  'train.eval_every train.eval_sequences train.sample_tokens optimizer.learning_rate optimizer.warmup_steps '
  'optimizer.weight_decay '
  'optimizer.clip_norm model.yarn_mscale mesh.pipe mesh.data mesh.expert mesh.tensor mesh.cpu_devices mesh.process_id '
  'checkpoint.every_steps',
  2: 'data.seq_len',
  1e-18: 'optimizer.eps',
  1e-20: 'model.norm_eps',
}
FRACTIONS = (
  'balance.gamma_off_fraction balance.gamma_decay_fraction balance.gamma_final_fraction balance.smebu_beta '
  'optimizer.decay_fraction optimizer.final_lr_fraction optimizer.beta1 optimizer.beta2'
)
KINDS = {name: kind for name, kind, _ in fields()}


@pytest.mark.parametrize(('name', 'valid'), ONE_OF.items())
def test_choices(name, valid):
  for value in valid:
    from_config_dict(changed({name: value}))
  with pytest.raises(UserError, match=re.escape(f"config {name} = 'other' must be one of ")):
    from_config_dict(changed({name: 'other'}))


@pytest.mark.parametrize(('name', 'least'), [(name, least) for least, names in LEAST.items() for name in names.split()])
def test_lower_bounds(name, least):
  with pytest.raises(UserError, match=re.escape(f'config {name} = {KINDS[name](least - 1)} must be at least {least}')):
    from_config_dict(changed({name: least - 1}))


@pytest.mark.parametrize('name', FRACTIONS.split())
def test_fractions(name):
  for value in (-0.1, 1.1):
    with pytest.raises(UserError, match=re.escape(f'config {name} = {value} must be between 0 and 1')):
      from_config_dict(changed({name: value}))
  for value in (0.0, 0.999999 if 'beta' in name.partition('.')[2] and 'smebu' not in name else 1.0):
    from_config_dict(changed({name: value}))


MOST = {
  1024: 'model.num_layers',
  2**16: 'model.num_experts model.num_shared_experts',
  64: 'model.mtp_depth',
  100: 'model.init_std model.yarn_mscale',
  1000: 'balance.gamma',
  100_000: 'train.sample_tokens',
  0.999999: 'optimizer.beta1 optimizer.beta2',
  4096: 'mesh.cpu_devices',
  2**32 - 1: 'train.seed',
}


@pytest.mark.parametrize(('name', 'most'), [(name, most) for most, names in MOST.items() for name in names.split()])
def test_upper_bounds(name, most):
  from_config_dict(changed({name: KINDS[name](most), 'data.seq_len': 128}))
  beyond = most + 1 if KINDS[name] is int else most * 1.0000009
  with pytest.raises(UserError, match=rf'config {name} = \S+ must be (at most {most}|between 0 and 1)'):
    from_config_dict(changed({name: beyond, 'data.seq_len': 128}))


@pytest.mark.parametrize('name', [name for name, kind in KINDS.items() if kind in (int, float)])
def test_no_number_passes_that_breaks(name):
  """What int32 and float32 can't hold, and what is nonsense below 0: refused, by name, for every setting."""
  beyond = [2**32, 2**63, 10**30] if KINDS[name] is int else [math.nan, math.inf, -math.inf, 1e39, -1e300]
  for value in (*beyond, KINDS[name](-1)):
    section, _, key = name.rpartition('.')
    with pytest.raises(UserError, match=re.escape(name)) as caught:
      from_config_dict({section: {key: value}})
    assert len(one_line(caught.value)) <= MOST_CHARACTERS


def test_paths_are_of_this_machine():
  for name in ('data.paths', 'data.tokenizer', 'data.cache_dir', 'train.init_from'):
    with pytest.raises(UserError, match=f"config {name} = 'gs://b/x' is an address"):
      from_config_dict(changed({name: 'gs://b/x'}))
  with pytest.raises(UserError, match='is an address'):
    from_config_dict(changed({'data.paths': 'here/,s3://b/x'}))


@pytest.mark.parametrize(
  ('overrides', 'fragment'),
  [
    ({'model.num_dense_layers': 4}, 'model.num_dense_layers = 4 must be below model.num_layers = 4'),
    ({'model.num_groups': 3}, 'model.num_experts = 16 must be divisible by model.num_groups = 3'),
    ({'model.top_groups': 2}, 'model.top_groups = 2 must be at most model.num_groups = 1'),
    ({'model.num_groups': 16, 'model.top_groups': 4}, 'model.num_groups = 16 leaves 1 expert per group'),
    ({'model.top_k': 17}, 'model.top_k = 17 is larger than the 16 experts'),
    ({'model.top_k': 5, 'model.num_groups': 4, 'model.top_groups': 1}, 'model.top_k = 5 is larger than the 4 experts'),
    ({'model.qk_rope_dim': 5}, 'model.qk_rope_dim = 5 must be even and at least 2'),
    ({'model.qk_rope_dim': 0}, 'model.qk_rope_dim = 0 must be even and at least 2'),
    ({'model.attention': 'mha'}, 'set model.qk_nope_dim = 32 and model.q_lora_rank = 0 to 0'),
    (MHA | {'model.q_lora_rank': 8}, 'set model.qk_nope_dim = 0 and model.q_lora_rank = 8 to 0'),
    ({'model.yarn_beta_fast': 1.0}, 'model.yarn_beta_fast = 1.0 must be above model.yarn_beta_slow = 1.0'),
    (
      {'model.yarn_beta_slow': 0.0},
      'model.yarn_beta_fast = 32.0 must be above model.yarn_beta_slow = 0.0, and both above 0',
    ),
    ({'model.rope_theta': 1.0}, 'model.rope_theta = 1.0 must be above 1'),
    *(({f'model.{name}': -1.0}, f'model.{name} = -1.0 must be above 0') for name in ('init_std', 'route_scale')),
    (
      {'balance.bias_rule': 'quantile', 'model.num_groups': 4, 'model.top_groups': 4},
      "balance.bias_rule = 'quantile' needs model.num_groups = 1, not 4",
    ),
    ({'balance.bias_rule': 'quantile', 'model.top_k': 16}, "'quantile' needs model.top_k = 16 below model.num_experts"),
    ({'train.microbatches': 3}, 'train.batch_size = 16 must be divisible by train.microbatches = 3'),
    (
      {'train.batch_size': 2**23, 'data.seq_len': 64},
      'train.batch_size = 8388608, data.seq_len = 64 and model.top_k = 4 make 2147483648 assignments a step',
    ),
    ({'model.d_model': 2**20, 'model.d_ff': 2**30}, ' parameters; at most 1e+13 are taken for no mistake'),
    ({'data.seq_len': 3, 'model.mtp_depth': 2}, 'data.seq_len = 3 leaves no target for model.mtp_depth = 2'),
    (
      {'balance.gamma_off_fraction': 0.5, 'balance.gamma_decay_fraction': 0.6},
      'balance.gamma_off_fraction = 0.5 and balance.gamma_decay_fraction = 0.6 must be at most 1 together',
    ),
    ({'data.val_fraction': 0.0}, 'data.val_fraction = 0.0 must be between 0 and 1'),
    ({'data.val_fraction': 1.0}, 'data.val_fraction = 1.0 must be between 0 and 1'),
    (
      {'mesh.num_processes': 2, 'mesh.process_id': 2, 'mesh.coordinator': 'a:1'},
      'mesh.process_id = 2 must be below mesh.num_processes = 2',
    ),
    ({'mesh.num_processes': 2}, "mesh.num_processes = 2 and mesh.coordinator = '' disagree"),
    ({'mesh.coordinator': 'a:1'}, "mesh.num_processes = 1 and mesh.coordinator = 'a:1' disagree"),
    *(
      ({'train.profile_steps': text}, f'train.profile_steps = {text!r} must look like')
      for text in ('\u00b2:\u00b3', '1:' + '9' * 5000, '5', '5:', ':5', '7:5', 'a:b', '-1:5', '1.0:2')
    ),
    ({'train.sample_prompt': 'a\udcff'}, "train.sample_prompt = 'a\\udcff' is not UTF-8"),
  ],
)
def test_combinations_that_cannot_run(overrides, fragment):
  with pytest.raises(UserError, match=re.escape(fragment)):
    from_config_dict(changed(overrides))


@pytest.mark.parametrize(
  'overrides',
  [
    MHA,
    {'model.num_groups': 8, 'model.top_groups': 2, 'model.top_k': 4},  # exactly as many as two groups of two hold
    {'model.top_k': 16},
    {'data.seq_len': 4, 'model.mtp_depth': 2},
    {'mesh.num_processes': 2, 'mesh.process_id': 1, 'mesh.coordinator': 'a:1'},
    {'balance.bias_rule': 'quantile', 'model.top_k': 15},
    {'train.profile_steps': '5:5'},
  ],
)
def test_combinations_at_the_border(overrides):
  from_config_dict(changed(overrides))


@pytest.mark.parametrize(('text', 'expected'), [('', []), ('10:12', [10, 11, 12]), ('0:0', [0])])
def test_profile_range(text, expected):
  assert list(profile_range(text)) == expected


def test_config_is_frozen_and_hashable():
  assert hash(Config()) == hash(Config(data=DataConfig()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().dispatch = 'local'
  assert isinstance(to_config_dict(Config()), ml_collections.ConfigDict)
