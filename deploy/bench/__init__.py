"""`shoal bench`: speed of an engine, its kernels and a server, beside the device's limits.

latency and throughput run an engine in this process, serve measures a server over HTTP, kernels
times operators.
"""
