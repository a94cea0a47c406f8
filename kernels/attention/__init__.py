"""Paged attention, RoPE, the KV store and block copies."""
