"""Hugging Face's DeepSeek-V3 in torch: its MoE layer and its training step, with grouped_mm experts."""

import contextlib
import dataclasses
import functools
import importlib.metadata

import numpy as np

from moe.bench.timing import GIB
from moe.config import Config, ModelConfig
from moe.interop import names

NAME = 'Hugging Face'


def missing() -> str:
  """Why there is no peer here; '' if there is one."""
  try:
    import torch  # noqa: F401
    from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: F401
  except ImportError as error:
    return f'no {NAME} peer: {error}'
  return ''


def versions() -> str:
  """Of torch and transformers, as far as they are installed."""
  found = []
  for name in ('torch', 'transformers'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found.append(f', {name} {importlib.metadata.version(name)}')
  return ''.join(found)


@functools.cache
def device() -> str:
  import torch

  return 'cuda' if torch.cuda.is_available() else 'cpu'


def make_config(model: ModelConfig):
  """The same model as Hugging Face's config, its experts by grouped_mm."""
  from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

  config = DeepseekV3Config(
    vocab_size=model.vocab_size,
    hidden_size=model.d_model,
    intermediate_size=model.d_ff,
    moe_intermediate_size=model.d_expert,
    num_hidden_layers=model.num_layers,
    first_k_dense_replace=model.num_dense_layers,
    num_attention_heads=model.num_heads,
    num_key_value_heads=model.num_heads,
    n_shared_experts=model.num_shared_experts,
    n_routed_experts=model.num_experts,
    num_experts_per_tok=model.top_k,
    n_group=model.num_groups,
    topk_group=model.top_groups,
    norm_topk_prob=model.normalize_gates,
    routed_scaling_factor=model.route_scale,
    q_lora_rank=model.q_lora_rank or None,
    kv_lora_rank=model.kv_lora_rank,
    qk_rope_head_dim=model.qk_rope_dim,
    qk_nope_head_dim=model.qk_nope_dim,
    v_head_dim=model.v_dim,
    initializer_range=model.init_std,
    rms_norm_eps=model.norm_eps,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
  )
  config._experts_implementation = 'grouped_mm'
  return config


class Layer:
  """DeepseekV3MoE with given weights. A call runs it forward and backward, and returns the output [T, D]."""

  def __init__(self, model: ModelConfig, weights: dict, x_TD, dy_TD, compute: str):
    """Copies `weights`, the nested dict of a MoELayer's parameters, and both arrays, by way of the host.

    Args:
      model: sizes of the layer.
      weights: of a MoELayer.
      x_TD, dy_TD: tokens, and the gradient that comes back.
      compute: 'float32' or 'bfloat16', of weights and tokens.
    """
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    self._before_bytes = torch.cuda.memory_allocated() if device() == 'cuda' else 0
    dtype = getattr(torch, compute)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
      with torch.device(device()):
        self.module = DeepseekV3MoE(make_config(model))
    finally:
      torch.set_default_dtype(default)
    gate, experts = self.module.gate, self.module.experts
    gate.e_score_correction_bias = torch.zeros(model.num_experts, device=device())  # float32, as in training
    F = model.d_expert
    with torch.no_grad():
      gate.weight.copy_(_tensor(weights['w_router_DE']).T)
      experts.gate_up_proj[:, :F].copy_(_tensor(weights['experts']['w_gate_eDF']).mT)
      experts.gate_up_proj[:, F:].copy_(_tensor(weights['experts']['w_up_eDF']).mT)
      experts.down_proj.copy_(_tensor(weights['experts']['w_down_eFD']).mT)
      if shared := weights.get('shared'):
        for name, matrix in (('gate', 'w_gate_DF'), ('up', 'w_up_DF'), ('down', 'w_down_FD')):
          getattr(self.module.shared_experts, f'{name}_proj').weight.copy_(_tensor(shared[matrix]).T)
    self.x, self.dy = (_tensor(a)[None].to(dtype) for a in (x_TD, dy_TD))
    self.x.requires_grad_()

  def __call__(self):
    self.module.zero_grad(set_to_none=True)
    self.x.grad = None
    y = self.module(self.x)
    y.backward(self.dy)
    return y.detach()[0]

  def outputs(self):
    """(output, dx, gradient of the first expert's down projection [F, D]), float32 numpy."""
    y = self()
    found = (y, self.x.grad[0], self.module.experts.down_proj.grad[0].T)
    return tuple(a.float().cpu().numpy() for a in found)

  def memory(self) -> dict:
    """A row's entries on the peak memory of a call, weights and gradients included; {} on a CPU."""
    import torch

    if device() != 'cuda':
      return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    self()
    return _peak(self._before_bytes)


class Training:
  """DeepseekV3ForCausalLM with fused AdamW: weights, gradients and moments in one dtype, sdpa attention, no clipping.

  A call is one step on the same batch and returns its loss, float32 [].
  """

  def __init__(self, config: Config, token_BS):
    """token_BS: int32 [B, S + 1], of which the first S are the input and, shifted by the model itself, the labels."""
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    torch.manual_seed(config.train.seed)
    with torch.device(device()):
      self.model = DeepseekV3ForCausalLM._from_config(
        make_config(config.model),
        dtype=getattr(torch, config.precision.compute),
        attn_implementation='sdpa',
        experts_implementation='grouped_mm',
      )
    self.model.train()
    opt = config.optimizer
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=opt.learning_rate,
      betas=(opt.beta1, opt.beta2),
      eps=opt.eps,
      weight_decay=opt.weight_decay,
      fused=True,
    )
    self.token_BS = torch.from_numpy(np.asarray(token_BS[:, :-1], np.int64)).to(device())

  def __call__(self):
    loss = self.model(input_ids=self.token_BS, labels=self.token_BS, use_cache=False).loss
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.detach().float()

  def memory(self) -> dict:
    """A row's entries on the peak memory so far; {} on a CPU."""
    return _peak(0) if device() == 'cuda' else {}


class Generation:
  """DeepseekV3ForCausalLM with given weights. A call is one `generate`, greedy, with its cache."""

  def __init__(self, config: Config, arrays: dict):
    """arrays: numpy parameters by dotted path; the router's bias is 0."""
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    model, F = config.model, config.model.d_expert
    arrays = arrays | {'bias_LE': np.zeros((model.num_routers, model.num_experts), np.float32)}
    made = make_config(model)
    made.use_cache = True
    with torch.device(device()):
      self.model = DeepseekV3ForCausalLM._from_config(
        made, dtype=getattr(torch, config.precision.compute), attn_implementation='sdpa'
      )
    self.model.eval()
    slots = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
    with torch.no_grad():
      for tensor in names.table(dataclasses.replace(model, mtp_depth=0)):
        if not tensor.is_expert:
          slots[tensor.name].copy_(_tensor(tensor.pack(lambda view: arrays[view.name][view.place])))
      for layer in range(model.num_moe_layers):
        experts = self.model.model.layers[model.num_dense_layers + layer].mlp.experts
        experts.gate_up_proj[:, :F].copy_(_tensor(arrays['layers.experts.w_gate_eDF'][layer]).mT)
        experts.gate_up_proj[:, F:].copy_(_tensor(arrays['layers.experts.w_up_eDF'][layer]).mT)
        experts.down_proj.copy_(_tensor(arrays['layers.experts.w_down_eFD'][layer]).mT)

  def __call__(self, prompts: list[list[int]], new: int) -> np.ndarray:
    """The `new` tokens after each prompt, int [B, new]; prompts are of one length."""
    import torch

    token_BS = torch.tensor(prompts, device=device())
    with torch.no_grad():
      out_BS = self.model.generate(
        token_BS,
        attention_mask=torch.ones_like(token_BS),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
      )
    return out_BS[:, token_BS.shape[1] :].cpu().numpy()


def _peak(before_bytes):
  import torch

  peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
  return {'peak_gib': peak_bytes / GIB, 'peak_by': 'torch.cuda.max_memory_allocated'}


def _tensor(array):
  """A jax array as a tensor on the device, by way of the host: DLPack's versions differ between the two."""
  import torch

  values = np.array(array)
  if values.dtype == np.float32:
    return torch.from_numpy(values).to(device())
  return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device())
