"""The wire protocols of meshnode: pure, sans-I/O, specified, with test vectors.

Nothing in this package knows a clock, a socket or a random number: time comes in as `now` (monotonic
seconds) or `wall_ms` (UTC milliseconds), randomness comes in as an argument. Every folder holds SPEC.md,
messages.py, usually machine.py, and vectors.json. See README.md for the index and the glossary.
"""
