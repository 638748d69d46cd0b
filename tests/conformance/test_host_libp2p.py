"""The net port's conformance suite on py-libp2p, over sockets of the loopback interface."""

from __future__ import annotations

import secrets

import pytest

from meshnode.net.libp2p.host import Libp2pHost, open_host
from tests.conformance.check_host import CHECKS, Check

pytestmark = pytest.mark.net


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_libp2p_host(check: Check) -> None:
    def make() -> Libp2pHost:
        return open_host(secrets.token_bytes(32))

    await check(make)
