"""Training: the pure step, and the host's side of a run: data in, rows out, checkpoints, evaluation, resumption."""
