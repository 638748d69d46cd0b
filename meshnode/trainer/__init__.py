"""Training and judging adapters, in a child process of the lowest priority.

The node sees `port.py`, and `process.py` is its side: neither imports torch. `child.py` is the other side.
"""
