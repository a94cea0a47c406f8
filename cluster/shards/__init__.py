"""Shard groups: placement of ranks on nodes and GPUs, and the actors that host them."""
