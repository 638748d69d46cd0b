"""Whole nodes in memory: the real `Node`s over a network, a store, a state and engines that are simulated.

`world.py` makes and moves them, `model.py` is a model for the null engine, `run.py` runs a scenario in virtual time,
the same way each time for the same seed.
"""
