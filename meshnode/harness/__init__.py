"""A whole mesh on one machine: real node processes over loopback, each with a data folder of its own.

For trying meshnode out, for tests and for benchmarks. Everything here is blocking and talks to the nodes the
way the command line does: through their control sockets, signals and log files.
"""
