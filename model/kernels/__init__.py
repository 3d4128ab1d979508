"""Triton kernels and CPU paths, each beside a slow obvious reference of the same signature."""
