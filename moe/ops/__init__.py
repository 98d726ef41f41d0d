"""Kernels and the small helpers they share."""
