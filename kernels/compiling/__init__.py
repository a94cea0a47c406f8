"""Compilation of Triton kernels ahead of the first request, in processes of its own."""
