"""Paged attention and what prepares it: RoPE, the KV store and block copies."""
