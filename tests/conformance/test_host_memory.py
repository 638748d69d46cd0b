"""The net port's conformance suite on the network in memory."""

from __future__ import annotations

import itertools

import pytest

from meshnode.sim.network import MemoryHost, MemoryNetwork
from protocols.ids import peer_id_of
from tests.conformance.check_host import CHECKS, Check


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_memory_host(check: Check) -> None:
    network = MemoryNetwork()
    numbers = itertools.count(1)

    def make() -> MemoryHost:
        return network.host(peer_id_of(next(numbers).to_bytes(32, "big")))

    await check(make)
