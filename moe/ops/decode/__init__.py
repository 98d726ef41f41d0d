"""What generation computes with few tokens: kernels for GPUs, each beside a path in plain JAX."""
