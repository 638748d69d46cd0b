"""A network that is gone for minutes and comes back: in virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.sim.world import World

BACK_S = 10.0  # promised from the moment at which packets get through again


@pytest.mark.parametrize("minutes", [1, 5, 30])
@pytest.mark.parametrize("nodes", [2, 5])
async def test_everybody_is_back_soon_after_all_links_were_dead(
    world: World, autojump_clock: MockClock, minutes: int, nodes: int
) -> None:
    world.add(nodes)
    await world.start_all()
    await world.until(world.joined)
    world.unplug()
    await trio.sleep(minutes * 60)
    assert not any(device.running.host.peers for device in world.up)
    world.network.heal()
    assert await world.until(world.joined) <= BACK_S


async def test_a_mesh_answers_again_after_an_outage(world: World, autojump_clock: MockClock) -> None:
    world.add(3, memory="1.4MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    answer = await world.ask("n1")
    world.unplug()
    await world.until(lambda: not world.all_ready())
    await trio.sleep(300)
    world.network.heal()
    assert await world.until(world.joined) <= BACK_S
    await world.until(world.all_ready)
    assert await world.ask("n1") == answer


async def test_members_of_a_large_mesh_are_back_although_each_dials_few_at_a_time(
    world: World, autojump_clock: MockClock
) -> None:
    world.add(12)
    await world.start_all()
    await world.until(world.joined)
    lost = [device.name for device in world.up][:7]  # they sit at a switch without power; the rest see each other
    everybody = [device.peer_id for device in world.up]
    world.network.unplug([world[name].peer_id for name in lost], everybody)
    await trio.sleep(300)
    world.network.heal()
    assert await world.until(world.joined) <= BACK_S


async def test_who_moved_is_found_through_a_third_node_at_once(world: World, autojump_clock: MockClock) -> None:
    """Two nodes lose each other and one gets a new address; the third one hears both."""
    world.add(3)
    await world.start_all()
    await world.until(world.joined)
    one, other, _ = world.devices.values()
    world.network.unplug([one.peer_id], [other.peer_id])
    await world.until(lambda: other.peer_id not in one.running.host.peers)
    await trio.sleep(100)
    world.network.move(other.peer_id, f"/ip4/10.9.9.9/tcp/4331/p2p/{other.peer_id}")
    world.network.heal()
    assert await world.until(world.joined) <= 2.5
