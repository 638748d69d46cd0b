"""A chain of real nodes that breaks: every node says so, and why, until a token has passed again."""

from __future__ import annotations

from trio.testing import MockClock

from meshnode.sim.world import World


async def test_a_lost_node_ends_readiness_at_once_and_its_return_brings_it_back(
    world: World, autojump_clock: MockClock
) -> None:
    world.add(3, memory="1.4MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    answer = await world.ask("n1")
    await world.crash("n2")
    took = await world.until(lambda: not any(device.running.readiness.now.ready for device in world.up))
    assert took < 5
    assert "went away" in world["n1"].running.readiness.now.sentence
    await world.until(lambda: "held by nobody" in world["n3"].running.readiness.now.sentence)
    await world.start("n2")
    await world.until(world.all_ready)
    assert world["n2"].running.content.bytes_fetched == 0, "what it had fetched was on its disk"
    assert await world.ask("n1") == answer
