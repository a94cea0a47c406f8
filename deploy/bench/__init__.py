"""`shoal bench`: how fast an engine, its kernels and a server are, and how far from what the device could do.

latency and throughput drive an engine in this process, serve drives a server over HTTP, kernels times operators alone.
"""
