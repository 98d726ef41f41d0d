"""Every setting, with its default and meaning, once.

`configs/*.py` return `to_config_dict(Config(...))`, an `ml_collections.ConfigDict`; after command-line overrides
`from_config_dict` turns it back into the frozen dataclasses below, rejecting unknown keys, wrong types and
combinations that cannot run, before anything is compiled.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from moe.errors import UserError
from moe.validation import one_of, validate

MAX_FLOAT = 3.4e38  # of float32, in which the settings are computed with
MAX_INT, MAX_SEED = 2**31 - 1, 2**32 - 1  # of int32 and uint32; larger seeds would repeat the smaller ones
VOCAB_MULTIPLE = 128  # the stored vocabulary is padded to this on every mesh, so that V always divides


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture (DeepSeek-V3, arXiv 2412.19437, section 2, unless said otherwise)."""

  vocab_size: int = 257  # token ids the model knows; the byte tokenizer needs 257
  d_model: int = 128  # D
  num_layers: int = 4  # all layers, the leading dense ones included, MTP modules not
  num_dense_layers: int = 1  # leading layers with a dense feed-forward instead of experts
  d_ff: int = 384  # hidden width of the dense feed-forward
  d_expert: int = 128  # F, hidden width of one expert
  num_experts: int = 16  # E, routed experts
  num_shared_experts: int = 1  # always-on experts, fused into one feed-forward of d_expert * num_shared_experts
  top_k: int = 4  # K, routed experts per token
  num_groups: int = 1  # G, expert groups for group-limited routing
  top_groups: int = 1  # groups a token may choose from
  score_fn: str = 'sigmoid'  # sigmoid | softmax
  normalize_gates: bool = True  # divide a token's K gate weights by their sum
  route_scale: float = 1.0  # factor on the gate weights (2.5 in V3)
  capacity_factor: float = 0.0  # 0: dropless. Else each expert keeps ceil(factor * T * K / E) per token shard
  attention: str = 'mla'  # mla | mha
  num_heads: int = 4  # H
  q_lora_rank: int = 0  # A, query latent rank of MLA; 0: queries straight from the residual stream
  kv_lora_rank: int = 64  # C, key/value latent rank of MLA
  qk_nope_dim: int = 32  # N, non-rotary head dim (0 for mha: all rotary)
  qk_rope_dim: int = 16  # R, rotary head dim
  v_dim: int = 32  # U, value head dim
  rope_theta: float = 10000.0  # base of the rotary frequencies
  yarn_factor: float = 1.0  # YaRN context extension; 1: off
  yarn_original_len: int = 4096  # sequence length before extension
  yarn_beta_fast: float = 32.0  # rotations above which a frequency is left alone
  yarn_beta_slow: float = 1.0  # rotations below which a frequency is fully interpolated
  yarn_mscale: float = 1.0  # softmax scale is multiplied by (0.1 * yarn_mscale * ln(factor) + 1)^2
  mtp_depth: int = 1  # multi-token-prediction modules
  tie_embeddings: bool = False  # the output head reuses the embedding
  norm_eps: float = 1e-6  # of every RMSNorm but those of MLA's latents, which have 1e-6
  init_std: float = 0.02  # of every weight matrix

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers

  @property
  def num_routers(self) -> int:
    """Rows of `load_LE` and of the router bias: the MoE layers, then the MTP modules."""
    return self.num_moe_layers + self.mtp_depth

  @property
  def router_names(self) -> list[str]:
    """Names of those rows: 'layer i' in the model's numbering from 0 (dense layers count), then 'MTP i'."""
    layers = range(self.num_dense_layers, self.num_layers)
    return [f'layer {i}' for i in layers] + [f'MTP {i}' for i in range(self.mtp_depth)]

  @property
  def padded_vocab(self) -> int:
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """How experts are kept equally loaded. Any bias rule goes with any auxiliary loss."""

  bias_rule: str = 'sign'  # a file of moe/balance/rules
  gamma: float = 0.001  # the bias rules' speed (u in arXiv 2408.15664)
  gamma_off_fraction: float = 0.0  # last fraction of the steps with gamma 0 (0.034 in V3)
  gamma_decay_fraction: float = 0.0  # fraction of the steps, before those, over which gamma falls linearly
  gamma_final_fraction: float = 0.0  # to this fraction of it
  smebu_kappa: float = 2.0  # slope inside SMEBU's tanh (arXiv 2602.17004)
  smebu_beta: float = 0.5  # SMEBU's momentum
  quantile_ema: float = 0.0  # share of its old value that the quantile rule's bias keeps a step; more as gamma falls
  aux_loss: str = 'none'  # one of moe.validation.AUX_LOSSES
  aux_alpha: float = 0.001  # weight of the auxiliary loss (1e-4 for sequence in V3)
  aux_scope: str = 'microbatch'  # microbatch | global_batch: tokens whose counts the Switch loss sees
  z_loss: float = 0.0  # weight of mean(logsumexp(router logits)^2) (ST-MoE: 1e-3)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text and how it becomes batches."""

  paths: str = ''  # comma-separated files, folders or globs (.txt .md .py .jsonl[.gz] .parquet); '': Python's stdlib
  tokenizer: str = 'byte'  # byte | bpe (trained on the corpus, cached) | path of a tokenizer.json
  seq_len: int = 256  # S
  val_fraction: float = 0.05  # of the documents (files, or records of .jsonl/.parquet)
  text_key: str = 'text'  # field of .jsonl records, column of .parquet files
  cache_dir: str = ''  # for tokenizers, encoded text, programs; '': $XDG_CACHE_HOME/moe-lossfree or ~/.cache/...


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  steps: int = 1000  # optimizer steps
  batch_size: int = 16  # sequences per optimizer step over the whole mesh
  microbatches: int = 0  # parts that the batch is worked off in; 0: 1, or in a pipeline up to 4 per rank
  schedule: str = '1f1b'  # of a pipeline: gpipe | 1f1b | zb_h1 | dualpipe | dualpipe_v
  seed: int = 0  # of weights and of the data order
  mtp_weight: float = 0.3  # lambda of the MTP loss
  remat: str = 'none'  # none | dots (keep matmul outputs) | full (keep layer inputs only)
  unroll_layers: int = 1  # MoE layers per turn of the loop over them: more compile longer and copy fewer weights
  log_every: int = 1  # steps per row of metrics.jsonl
  load_every: int = 0  # steps per row of load_history.jsonl; 0: log_every, or more where that makes over 2,000 rows
  eval_every: int = 250  # steps between evaluations; 0: only at the end
  eval_sequences: int = 0  # validation sequences, spread over the text, of a periodic evaluation; 0: all, as at the end
  init_from: str = ''  # run directory whose weights and router bias start this run (moments and step do not)
  profile_steps: str = ''  # 'first:last' writes a trace of these steps to WORKDIR/profile
  logger: str = 'none'  # none | wandb | mlflow: a service that is told the numbers of all rows, too
  sample_prompt: str = 'def '  # prompt of the generated sample in the report
  sample_tokens: int = 200  # its length; 0: none


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (weight decay on matrices only) under a warm-up schedule."""

  learning_rate: float = 1e-3  # peak
  schedule: str = 'wsd'  # wsd (warm-up, stable, linear decay) | cosine (warm-up, cosine)
  warmup_steps: int = 50
  decay_fraction: float = 0.2  # wsd: last fraction of the steps that decays
  final_lr_fraction: float = 0.1  # learning rate at the end / peak
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # global gradient norm; 0: no clipping
  moments: str = 'float32'  # float32 | bfloat16, dtype of both Adam moments


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
  """Master weights, router, norms' statistics and losses are always float32."""

  # What is in FP8 (moe/ops/fp8.py), comma-separated: the matmuls of experts, ffn (dense and shared) and attention (its
  # projections), and dispatch: rows on their way to experts of other shards.
  fp8: str = ''
  compute: str = 'float32'  # float32 | bfloat16, of activations and of the weights used in matmuls
  matmul: str = 'default'  # default | highest, precision of float32 matmuls (default is TF32 on GPUs)

  @property
  def fp8_modules(self) -> tuple[str, ...]:
    return tuple(filter(None, self.fp8.split(',')))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Device mesh (pipe, data, expert, tensor). Axis sizes of 0 take the preset's."""

  preset: str = 'local'  # local | h20x16 | h20x16_ep | h20x16_serve (moe/parallel/mesh.py)
  pipe: int = 0  # pipeline stages
  data: int = 0  # batch shards that hold copies of all experts
  expert: int = 0  # batch shards that hold different experts
  tensor: int = 0  # shards of heads, hidden width and vocabulary
  cpu_devices: int = 0  # split the CPU into so many virtual devices; 0: leave as is
  coordinator: str = ''  # host:port of process 0 for runs of several processes; '': one process
  num_processes: int = 1  # processes of the run
  process_id: int = 0  # this process
  start_timeout_s: int = 300  # for all processes of a run to meet


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints are written in the background; the newest is resumed from."""

  every_steps: int = 200  # steps between checkpoints; 0: only at the end and on SIGTERM
  keep: int = 2  # newest checkpoints kept, and one more until the next is begun; a damaged newest one is gone back from


@dataclasses.dataclass(frozen=True)
class Config:
  """One training run."""

  model: ModelConfig = ModelConfig()
  balance: BalanceConfig = BalanceConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  precision: PrecisionConfig = PrecisionConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  dispatch: str = 'auto'  # auto (local on one expert shard, else all_gather) | local | all_gather | all_to_all | ragged
  grouped_matmul: str = 'auto'  # auto (CPU: blocked, bf16 on Hopper: mosaic_gpu, else ragged_dot) | one of these names


def _kinds(cls, prefix=''):
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from _kinds(field.type, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, field.type


SECTIONS = tuple(field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type))
KINDS = dict(_kinds(Config))  # the type of every setting by its full key: {'model.vocab_size': int, ...}


def to_config_dict(config: Config, arg: str = '') -> ml_collections.ConfigDict:
  """The same settings as an overridable ConfigDict, with `arg`, 'key=value,...', applied.

  `arg` is what follows the colon in `--config=configs/tiny.py:train.seed=3,balance.bias_rule=none`.

  Raises:
    UserError: `arg` is not of that form or names an unknown key.
  """
  config_dict = ml_collections.ConfigDict(dataclasses.asdict(config))
  for item in filter(None, arg.split(',')):
    try:
      key, value = parse_setting(item)
    except UserError as error:
      raise UserError(f'config argument {item!r}: {error}') from error
    section, _, name = key.rpartition('.')
    (config_dict[section] if section else config_dict)[name] = value
  return config_dict


def parse_setting(text: str) -> tuple[str, Any]:
  """The setting and the value in 'train.seed=3'. Raises UserError: not of that form, an unknown key, a wrong type."""
  key, equals, value = text.partition('=')
  if not equals or key in SECTIONS:
    raise UserError(f'{text!r} must look like train.seed=3')
  check_key(key)
  return key, parsed(key, value)


def parsed(key: str, text: str) -> Any:
  """The value that `text` spells for the setting `key`. Raises UserError: `text` is not of the setting's type."""
  kind = KINDS[key]
  if kind is bool:
    one_of(key, text, ('true', 'false'))
    return text == 'true'
  try:
    return kind(text)
  except ValueError:
    raise UserError(f'config {key} = {text!r} must be of type {kind.__name__}') from None


def check_key(key: str) -> None:
  """Raises UserError, naming the nearest valid one, unless `key` is one setting: 'train.steps'."""
  if key not in KINDS:
    raise UserError(f'unknown setting {key!r}; the nearest valid one is {nearest(key, KINDS)!r}')


def nearest(key: str, known: Iterable[str]) -> str:
  """The one of the `known` keys that `key` most likely stands for: misspelled, without its section, or initials."""
  spellings = {}
  for whole in known:
    section, dot, name = whole.rpartition('.')
    initials = ''.join(word[:1] for word in name.split('_'))
    for spelling in (initials, section + dot + initials, name, whole):
      spellings[spelling] = whole
  return spellings[difflib.get_close_matches(str(key), spellings, 1, 0.0)[0]]


def from_config_dict(config_dict: Any, changes: Mapping[str, Any] | None = None) -> Config:
  """Turns a (nested) mapping back into a checked `Config`.

  Args:
    changes: {'section.key': value}, put over it.

  Raises:
    UserError: unknown key (the nearest valid one is named), wrong type, or a combination that cannot run.
  """
  config = _build(Config, config_dict, '')
  if changes:
    settings = dataclasses.asdict(config)
    for key, value in changes.items():
      check_key(key)
      section, _, name = key.rpartition('.')
      (settings[section] if section else settings)[name] = value
    config = _build(Config, settings, '')
  validate(config)
  return config


def _build(cls, values, path):
  if not hasattr(values, 'keys'):
    raise UserError(f'config {path.rstrip(".")} is a section and cannot be set to {values!r}')
  fields = {field.name: field for field in dataclasses.fields(cls)}
  kwargs = {}
  for key in values:
    if key not in fields:
      near = nearest(key, fields)
      raise UserError(f'unknown config key {path + str(key)!r}; the nearest valid one is {path + near!r}')
    kind, value, name = fields[key].type, values[key], path + key
    kwargs[key] = _build(kind, value, name + '.') if dataclasses.is_dataclass(kind) else _typed(kind, value, name)
  return cls(**kwargs)


def _typed(kind, value, name):
  if type(value) is not kind and not (kind is float and type(value) is int):
    raise UserError(f'config {name} = {value!r} has type {type(value).__name__}; it must be of type {kind.__name__}')
  if kind is float and not abs(value) <= MAX_FLOAT:  # asked first: an integer may be larger than any float
    raise UserError(f'config {name} = {value!r} must be a finite number of float32')
  most = MAX_SEED if name == 'train.seed' else MAX_INT
  if kind is int and value > most:
    raise UserError(f'config {name} = {value} must be at most {most}')
  return kind(value)
