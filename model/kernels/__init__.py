"""Triton kernels and CPU implementations, each beside a slow and obvious reference with the same signature."""
