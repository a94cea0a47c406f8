"""`shoal doctor`: checks whether models can start on this machine or Ray cluster, and run at full
speed.

A check returns findings; it raises nothing and changes nothing. Probes are separate processes for
all that needs torch or Ray, since they may hang or crash.
"""
