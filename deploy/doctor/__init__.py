"""`shoal doctor`: what on this machine, or in a running Ray, would keep models from starting or from being fast.

A check looks at one thing and returns findings; it raises nothing and changes nothing. What needs torch or Ray is done
by probes, processes of their own: they may hang or crash without taking the doctor along.
"""
