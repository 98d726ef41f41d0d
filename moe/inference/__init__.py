"""Generation with a trained model.

load       a run directory or a Hugging Face folder -> parameters
weights    parameters -> weights as generation uses them, a tree per layer
quantize   weights -> FP8 or MXFP4; what they and the cache take of a cluster's memory
forward    the model on a chunk of tokens, with a cache
steps      what the device does: a prompt's chunk, a token, drafts and their check
sampling   logits -> tokens
generate   the host's side: prompts in, tokens out
text       tokens -> text, as they come
chat       a conversation -> tokens, by a folder's template
"""
