"""Shard groups: rank placement on nodes and GPUs, and the actors of the ranks."""
