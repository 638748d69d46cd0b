"""Members on one local network, without a bootstrap peer: in virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.sim.world import World

MOVED_S = 15.0  # promised


@pytest.mark.parametrize("nodes", [2, 6])
async def test_strangers_of_one_network_meet_without_a_bootstrap_peer(
    world: World, autojump_clock: MockClock, nodes: int
) -> None:
    world.seeds, world.one_lan = 0, True
    world.add(nodes)
    await world.start_all()
    assert await world.until(world.joined) <= MOVED_S


@pytest.mark.parametrize("minutes", [0, 1, 30])
async def test_all_addresses_are_new_at_once(world: World, autojump_clock: MockClock, minutes: float) -> None:
    """A new router, with another range of addresses: nothing that a node knows of another one holds."""
    world.seeds, world.one_lan = 0, True
    world.add(4)
    await world.start_all()
    await world.until(world.joined)
    world.unplug()
    await trio.sleep(5 + minutes * 60)
    world.network.heal()
    for number, device in enumerate(world.up, 1):
        world.network.move(device.peer_id, f"/ip4/192.168.7.{number}/tcp/4331/p2p/{device.peer_id}")
    assert await world.until(world.joined) <= MOVED_S
