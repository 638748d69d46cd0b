"""Somebody copies a data folder and starts it: two nodes with one key. In virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.sim.world import Device, World

BACK_S = 15.0  # promised, from the moment at which the copy stops


def believed(world: World, device: Device) -> list[str]:
    """Which of the others plan with a node."""
    others = [other for other in world.up if other.peer_id != device.peer_id]
    return [other.name for other in others if device.peer_id in other.running.directory.live()]


def warnings(world: World) -> set[str]:
    return {shown.code for device in world.up for shown in device.running.health.current()}


@pytest.mark.parametrize("seconds", [3, 30, 100])
@pytest.mark.parametrize("end", ["it crashes", "it leaves"])
async def test_the_true_node_is_back_soon_after_its_copy_has_stopped(
    world: World, autojump_clock: MockClock, seconds: float, end: str
) -> None:
    world.add(4, memory="1.2MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    answer = await world.ask("n1")
    true, copy = world["n3"], world.copy("n3")
    incarnation = true.running.incarnation
    await world.start(copy.name)
    await trio.sleep(seconds)
    if seconds > 20:
        await world.until(lambda: not believed(world, true), within_s=1)
        assert "two-writers" in warnings(world)
        for _ in range(20):
            await trio.sleep(1)
            assert not believed(world, true), "nobody relies on either of them while both are there"
    if end == "it crashes":
        await world.crash(copy.name)
    else:
        await world.leave(copy.name)
    assert await world.until(lambda: len(believed(world, true)) == 3) <= BACK_S
    await world.until(world.all_ready)
    assert await world.ask("n1") == answer
    assert true.running.incarnation == incarnation, "without a restart"
    assert not warnings(world) & {"two-writers", "bad-provider"}


async def test_after_a_restart_the_true_node_is_still_above_its_copy(world: World, autojump_clock: MockClock) -> None:
    world.add(3)
    await world.start_all()
    await world.until(world.connected)
    true, copy = world["n3"], world.copy("n3")
    world.wall.skew_ms = 3_600_000
    await world.start(copy.name)  # on a machine whose clock is an hour ahead
    world.wall.skew_ms = 0
    await trio.sleep(30)
    await world.crash(copy.name)
    await world.until(lambda: len(believed(world, true)) == 2)
    await world.crash(true.name)
    await world.start(true.name)
    await world.until(lambda: len(believed(world, true)) == 2, within_s=BACK_S)


async def test_a_copy_that_came_and_went_while_the_true_node_was_away(
    world: World, autojump_clock: MockClock
) -> None:
    world.add(3)
    await world.start_all()
    await world.until(world.connected)
    true, copy = world["n3"], world.copy("n3")
    await world.crash(true.name)
    world.wall.skew_ms = 3_600_000
    await world.start(copy.name)
    world.wall.skew_ms = 0
    await world.until(lambda: len(believed(world, copy)) == 2)
    await world.crash(copy.name)
    await trio.sleep(60)  # nobody has a record of it that still counts
    assert not believed(world, true)
    await world.start(true.name)
    await world.until(lambda: len(believed(world, true)) == 2, within_s=BACK_S)
