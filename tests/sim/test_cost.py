"""What it costs to be there while nothing happens: the same in a small mesh and in a large one."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import MockClock

from meshnode.sim.network import MemoryHost
from meshnode.sim.world import World

SETTLED_S = 60.0
MEASURED_S = 230.0  # longer than the time in which each of a hundred nodes renews its advert
GROWTH = 1.5  # promised, from 10 nodes to 100


async def messages(world: World, nodes: int) -> float:
    """Messages that a node sends in a second: gossip, and streams that it opens."""
    world.add(nodes)
    await world.start_all()
    await world.until(world.connected)
    await trio.sleep(SETTLED_S)
    hosts = [device.running.host for device in world.up]

    def count() -> int:
        return sum(host.sent + host.opened for host in hosts if isinstance(host, MemoryHost))

    before = count()
    await trio.sleep(MEASURED_S)
    return (count() - before) / MEASURED_S / nodes


@pytest.mark.slow
@pytest.mark.skipif("MESHNODE_TEST_LONG" not in os.environ, reason="takes three minutes: run by `make test-long`")
async def test_messages_of_a_node_do_not_grow_with_the_mesh(autojump_clock: MockClock) -> None:
    figures = {}
    for nodes in (10, 100):
        async with World.open(1) as world:
            figures[nodes] = await messages(world, nodes)
    print(f"\nmessages per node and second: {figures}")
    assert figures[100] <= GROWTH * figures[10]
