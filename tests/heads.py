"""Logits by the pieces of the model that training never makes whole."""

from moe.ops.cross_entropy import head_logits
from moe.ops.norm import rms_norm


def head(model, h_BSD, scale_D):
  """float32 logits [B, S, V] of a `Transformer` before its final norm, or of an MTP module with its scale."""
  w_DV = model.w_embedding_VD[...].T if model.config.tie_embeddings else model.w_head_DV[...]
  return head_logits(rms_norm(h_BSD, scale_D, model.config.norm_eps), w_DV, model.config.vocab_size)
