"""The model once more in naive float64 numpy: loops over tokens, heads and experts, written from the papers.

Nothing here is shared with `moe`, the config dataclasses aside. Parameters are nested dicts named like the model's.
Routing is dense: [T, E] arrays that are 0 or False for experts that were not chosen.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np


def float64(tree):
  """A nested dict of arrays (or one array) in float64."""
  if isinstance(tree, dict):
    return {key: float64(value) for key, value in tree.items()}
  return np.asarray(tree, np.float64)


def layer_slice(tree, index):
  """Layer `index` of parameters that are stacked over layers."""
  if isinstance(tree, dict):
    return {key: layer_slice(value, index) for key, value in tree.items()}
  return tree[index]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  exp = np.exp(x - x.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def log_sum_exp(x):
  top = x.max(-1)
  return top + np.log(np.exp(x - top[..., None]).sum(-1))


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def swiglu(x, w_gate, w_up, w_down):
  gate = x @ w_gate
  return (gate * sigmoid(gate) * (x @ w_up)) @ w_down


# ---------------------------------------------------------------------------------------------------------- routing


class Routing(NamedTuple):
  chosen_TE: np.ndarray  # bool, every token
  kept_TE: np.ndarray  # bool, without masked tokens and dropped assignments
  weight_TE: np.ndarray  # gate weights of the chosen
  load_E: np.ndarray  # chosen by unmasked tokens, before dropping
  scores_TE: np.ndarray
  logits_TE: np.ndarray


def route(x_TD, w_router_DE, bias_E, mask_T, model, multiplicative=False, dropless=False) -> Routing:
  """DeepSeek-V3's node-limited routing, one token after the other."""
  T, E = len(x_TD), model.num_experts
  per_group = E // model.num_groups
  chosen_TE, weight_TE = np.zeros((T, E), bool), np.zeros((T, E))
  scores_TE, logits_TE = np.zeros((T, E)), np.zeros((T, E))
  for t in range(T):
    logits = x_TD[t] @ w_router_DE
    scores = sigmoid(logits) if model.score_fn == 'sigmoid' else softmax(logits)
    biased = scores * bias_E if multiplicative else scores + bias_E
    if model.num_groups > 1:
      group_score = []
      for group in range(model.num_groups):
        members = sorted(biased[group * per_group : (group + 1) * per_group])
        group_score.append(members[-1] + members[-2])
      open_groups = sorted(range(model.num_groups), key=lambda group: -group_score[group])[: model.top_groups]
      biased = [biased[e] if e // per_group in open_groups else -math.inf for e in range(E)]
    chosen = sorted(range(E), key=lambda e: -biased[e])[: model.top_k]
    total = sum(scores[e] for e in chosen) if model.normalize_gates else 1
    for e in chosen:
      chosen_TE[t, e], weight_TE[t, e] = True, model.route_scale * scores[e] / total
    scores_TE[t], logits_TE[t] = scores, logits
  kept_TE = chosen_TE & mask_T[:, None]
  load_E = kept_TE.sum(0)
  if model.capacity_factor and not dropless:
    kept_TE = within_capacity(kept_TE, weight_TE, math.ceil(model.capacity_factor * T * model.top_k / E))
  return Routing(chosen_TE, kept_TE, weight_TE, load_E, scores_TE, logits_TE)


def within_capacity(kept_TE, weight_TE, capacity):
  """Each expert keeps its `capacity` heaviest tokens; of equals, the first."""
  kept_TE = kept_TE.copy()
  for e in range(kept_TE.shape[1]):
    tokens = sorted(np.flatnonzero(kept_TE[:, e]), key=lambda t: -weight_TE[t, e])
    kept_TE[tokens[capacity:], e] = False
  return kept_TE


# ---------------------------------------------------------------------------------------------------------- experts


def experts(x_TD, weight_TE, kept_TE, w_gate_EDF, w_up_EDF, w_down_EFD):
  """Gate-weighted sum of the kept experts' outputs."""
  y_TD = np.zeros((len(x_TD), w_down_EFD.shape[2]))
  for t, e in zip(*np.nonzero(kept_TE), strict=True):
    y_TD[t] += weight_TE[t, e] * swiglu(x_TD[t], w_gate_EDF[e], w_up_EDF[e], w_down_EFD[e])
  return y_TD


def experts_backward(x_TD, weight_TE, kept_TE, w_gate_EDF, w_up_EDF, w_down_EFD, dy_TD):
  """Gradients of sum(dy * experts(...)) with respect to x, weight, w_gate, w_up and w_down, by the chain rule."""
  dx_TD, dweight_TE = np.zeros_like(x_TD), np.zeros_like(weight_TE)
  dw_gate, dw_up, dw_down = np.zeros_like(w_gate_EDF), np.zeros_like(w_up_EDF), np.zeros_like(w_down_EFD)
  for t, e in zip(*np.nonzero(kept_TE), strict=True):
    gate, up = x_TD[t] @ w_gate_EDF[e], x_TD[t] @ w_up_EDF[e]
    hidden = gate * sigmoid(gate) * up
    dweight_TE[t, e] = dy_TD[t] @ (hidden @ w_down_EFD[e])
    dw_down[e] += weight_TE[t, e] * np.outer(hidden, dy_TD[t])
    dhidden = weight_TE[t, e] * (w_down_EFD[e] @ dy_TD[t])
    dgate = dhidden * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dup = dhidden * gate * sigmoid(gate)
    dw_gate[e] += np.outer(x_TD[t], dgate)
    dw_up[e] += np.outer(x_TD[t], dup)
    dx_TD[t] += w_gate_EDF[e] @ dgate + w_up_EDF[e] @ dup
  return dx_TD, dweight_TE, dw_gate, dw_up, dw_down


# -------------------------------------------------------------------------------------------------------- attention


def yarn_frequencies(pairs, theta, factor=1.0, original_len=4096, beta_fast=32.0, beta_slow=1.0):
  """Radians per position of each pair, from wavelengths (arXiv 2309.00071, section 3.2; DeepSeek's ramp).

  A pair of wavelength w turns original_len / w times. From beta_fast turns on it is kept, up to beta_slow turns its
  wavelength is stretched by the factor. DeepSeek's code ramps between the two in the pair's number, widened to whole
  pairs, where the paper ramps in the number of turns.
  """
  wavelength = [2 * math.pi * theta ** (pair / pairs) for pair in range(pairs)]
  if factor == 1:
    return np.array([2 * math.pi / w for w in wavelength])
  fast, slow = original_len / beta_fast, original_len / beta_slow  # wavelengths of the ramp's ends
  # Extended in both directions, the list of wavelengths w(pair) tells the last whole pair at or before a wavelength.
  w_of = lambda pair: 2 * math.pi * theta ** (pair / pairs)
  first = max(pair for pair in range(-10 * pairs, 10 * pairs) if w_of(pair) <= fast)
  last = min(pair for pair in range(-10 * pairs, 10 * pairs) if w_of(pair) >= slow)
  first, last = max(first, 0), min(last, 2 * pairs - 1)
  result = []
  for pair, w in enumerate(wavelength):
    stretched = 1.0 if pair >= last else 0.0 if pair <= first else (pair - first) / (last - first)
    result.append((1 - stretched) * 2 * math.pi / w + stretched * 2 * math.pi / (w * factor))
  return np.array(result)


def rope(x_SR, frequency_P):
  """Each pair of components as a complex number, turned by position * frequency."""
  z_SP = x_SR[:, 0::2] + 1j * x_SR[:, 1::2]
  z_SP = z_SP * np.exp(1j * np.outer(np.arange(len(x_SR)), frequency_P))
  return np.stack([z_SP.real, z_SP.imag], axis=-1).reshape(x_SR.shape)


def softmax_scale(model):
  scale = 1 / math.sqrt(model.qk_nope_dim + model.qk_rope_dim)
  return scale if model.yarn_factor == 1 else scale * (0.1 * model.yarn_mscale * math.log(model.yarn_factor) + 1) ** 2


def attend(q_SN, k_SN, v_SU, segment_S, scale):
  """One head of one sequence: each position looks at itself and at earlier ones of its segment."""
  out_SU = np.zeros((len(q_SN), v_SU.shape[1]))
  for position in range(len(q_SN)):
    seen = [earlier for earlier in range(position + 1) if segment_S[earlier] == segment_S[position]]
    out_SU[position] = softmax(scale * k_SN[seen] @ q_SN[position]) @ v_SU[seen]
  return out_SU


def attention(x_BSD, segment_BS, w, model):
  """MLA or plain multi-head attention, as model.attention says; `w` are the layer's parameters."""
  frequency_P = yarn_frequencies(
    model.qk_rope_dim // 2,
    model.rope_theta,
    model.yarn_factor,
    model.yarn_original_len,
    model.yarn_beta_fast,
    model.yarn_beta_slow,
  )
  y_BSD = np.zeros_like(x_BSD)
  for b, x_SD in enumerate(x_BSD):
    for h in range(model.num_heads):
      if model.attention == 'mha':
        q_S, k_S = (rope(x_SD @ w[name][:, h], frequency_P) for name in ('w_query_DHR', 'w_key_DHR'))
        v_SU = x_SD @ w['w_value_DHU'][:, h]
      else:
        if model.q_lora_rank:
          latent_SA = rms_norm(x_SD @ w['w_query_down_DA'], w['scale_query_A'], 1e-6)
          q_nope, q_rope = latent_SA @ w['w_query_AHN'][:, h], latent_SA @ w['w_query_rope_AHR'][:, h]
        else:
          q_nope, q_rope = x_SD @ w['w_query_DHN'][:, h], x_SD @ w['w_query_rope_DHR'][:, h]
        latent_SC = rms_norm(x_SD @ w['w_kv_down_DC'], w['scale_kv_C'], 1e-6)
        q_S = np.concatenate([q_nope, rope(q_rope, frequency_P)], axis=1)
        k_rope = rope(x_SD @ w['w_key_rope_DR'], frequency_P)
        k_S = np.concatenate([latent_SC @ w['w_key_CHN'][:, h], k_rope], axis=1)
        v_SU = latent_SC @ w['w_value_CHU'][:, h]
      y_BSD[b] += attend(q_S, k_S, v_SU, segment_BS[b], softmax_scale(model)) @ w['w_out_HUD'][h]
  return y_BSD


# ------------------------------------------------------------------------------------------------------- whole model


def moe_layer(x_BSD, segment_BS, mask_BS, bias_E, w, model):
  """A layer with experts, and its `Routing`."""
  x_BSD = x_BSD + attention(rms_norm(x_BSD, w['scale_attention_D'], model.norm_eps), segment_BS, w['attention'], model)
  h_TD = rms_norm(x_BSD, w['scale_ffn_D'], model.norm_eps).reshape(-1, model.d_model)
  routing = route(h_TD, w['w_router_DE'], bias_E, mask_BS.reshape(-1), model)
  matrices = [w['experts'][name] for name in ('w_gate_eDF', 'w_up_eDF', 'w_down_eFD')]
  y_TD = experts(h_TD, routing.weight_TE, routing.kept_TE, *matrices)
  if model.num_shared_experts:
    y_TD += swiglu(h_TD, *(w['shared'][name] for name in ('w_gate_DF', 'w_up_DF', 'w_down_FD')))
  return x_BSD + y_TD.reshape(x_BSD.shape), routing


def logits(h_BSD, scale_D, w, model):
  """Logits of the real vocabulary only."""
  w_head_DV = w['w_embedding_VD'].T if model.tie_embeddings else w['w_head_DV']
  return rms_norm(h_BSD, scale_D, model.norm_eps) @ w_head_DV[:, : model.vocab_size]


def cross_entropy(logits_BSV, token_BS, predict_BS):
  """Summed over the positions of predict_BS, position by position."""
  total = 0.0
  for b, s in zip(*np.nonzero(predict_BS), strict=True):
    total -= np.log(softmax(logits_BSV[b, s])[token_BS[b, s]])
  return total


def model_forward(w, bias_LE, token_BS, segment_BS, model):
  """The complete model on rows of S + 1 tokens.

  Returns:
    nats: summed cross-entropy of the main head and of each MTP module; predicted: positions each sums over;
    routings: of the MoE layers, then of the MTP modules; routed: bool [B, S] positions each of these counts.
  """
  S, eps = token_BS.shape[1] - 1, model.norm_eps

  def reaches(by):
    """Positions whose token `by` ahead exists and belongs to the same document."""
    return np.array([[j + by <= S and seg[j] > 0 and seg[j + by] == seg[j] for j in range(S)] for seg in segment_BS])

  def tokens(by):
    return np.array([[row[j + by] if j + by <= S else 0 for j in range(S)] for row in token_BS])

  segments, routings, routed = segment_BS[:, :S], [], []
  h_BSD = w['w_embedding_VD'][tokens(0)]
  for index in range(model.num_dense_layers):
    layer = w['dense_layers'][index]
    h_BSD = h_BSD + attention(rms_norm(h_BSD, layer['scale_attention_D'], eps), segments, layer['attention'], model)
    ffn = [layer['ffn'][name] for name in ('w_gate_DF', 'w_up_DF', 'w_down_FD')]
    h_BSD = h_BSD + swiglu(rms_norm(h_BSD, layer['scale_ffn_D'], eps), *ffn)
  for index in range(model.num_moe_layers):
    h_BSD, routing = moe_layer(h_BSD, segments, reaches(0), bias_LE[index], layer_slice(w['layers'], index), model)
    routings.append(routing)
    routed.append(reaches(0))
  nats = [cross_entropy(logits(h_BSD, w['scale_out_D'], w, model), tokens(1), reaches(1))]
  for depth in range(1, model.mtp_depth + 1):
    module = w['mtp'][depth - 1]
    embedded = rms_norm(w['w_embedding_VD'][tokens(depth)], module['scale_embedding_D'], eps)
    scale_before = w['scale_out_D'] if depth == 1 else w['mtp'][depth - 2]['scale_out_D']
    hidden = rms_norm(rms_norm(h_BSD, scale_before, eps), module['scale_hidden_D'], eps)
    projection = np.concatenate([module['w_hidden_DD'], module['w_embedding_DD']])
    x_BSD = np.concatenate([hidden, embedded], axis=-1) @ projection
    bias_E = bias_LE[model.num_moe_layers + depth - 1]
    h_BSD, routing = moe_layer(x_BSD, segments, reaches(depth), bias_E, module['layer'], model)
    routings.append(routing)
    routed.append(reaches(depth))
    nats.append(cross_entropy(logits(h_BSD, module['scale_out_D'], w, model), tokens(depth + 1), reaches(depth + 1)))
  predicted = [reaches(distance + 1).sum() for distance in range(model.mtp_depth + 1)]
  return np.array(nats), np.array(predicted), routings, routed


# --------------------------------------------------------------------------------------------------- balance losses


def switch_loss(scores_TE, load_E, mask_T):
  """E sum_i f_i P_i: f_i the share of assignments, P_i the mean normalised score (arXiv 2101.03961, equation 4)."""
  probs_TE = scores_TE / scores_TE.sum(-1, keepdims=True)
  return len(load_E) * sum(load_E[e] / load_E.sum() * probs_TE[mask_T, e].mean() for e in range(len(load_E)))


def sequence_loss(scores_BSE, mask_BS, top_k):
  """Mean over sequences, weighted by their tokens, of sum_i f_i P_i (arXiv 2412.19437, equations 17-20)."""
  E, total = scores_BSE.shape[-1], 0.0
  for scores_SE, mask_S in zip(scores_BSE, mask_BS, strict=True):
    scores_SE = scores_SE[mask_S]
    f, p = np.zeros(E), np.zeros(E)
    for scores_E in scores_SE:
      for e in np.argsort(-scores_E)[:top_k]:
        f[e] += E / (top_k * len(scores_SE))
      p += scores_E / scores_E.sum() / len(scores_SE)
    total += len(scores_SE) * f @ p
  return total / mask_BS.sum()


# ---------------------------------------------------------------------------------------------------------- numerics


def numerical_gradient(function, x, step=1e-6):
  """Central differences of a scalar function of one float64 array."""
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    shift = np.zeros_like(x)
    shift[index] = step
    gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
  return gradient


def max_vio(load_E):
  return load_E.max() / load_E.mean() - 1


def quantize(x, rows, columns, power_of_two=False):
  """FP8 with scales: dequantised float64 values of a matrix, and its scales, by loops over blocks."""
  out, scales = np.zeros(x.shape), []
  for r in range(0, x.shape[0], rows):
    scales.append([])
    for c in range(0, x.shape[1], columns):
      block = x[r : r + rows, c : c + columns]
      scale = np.float32(max(np.abs(block).max(), np.float32(1e-4))) / np.float32(448)
      if power_of_two:
        scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
      rounded = np.clip(block / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
      out[r : r + rows, c : c + columns] = rounded.astype(np.float64) * scale
      scales[-1].append(scale)
  return out, np.array(scales)
