"""Ahead-of-time compilation of Triton kernels in separate processes."""
