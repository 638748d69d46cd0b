"""An owner pauses and drains a node: real nodes in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from meshnode.api.commands import Commands
from meshnode.api.messages import PeerStatus
from meshnode.cli.status import describe
from meshnode.core.durations import MAX_S
from meshnode.core.errors import BadRequest
from meshnode.embed import LocalNode
from meshnode.policy.duty import Duty, duty_of
from meshnode.policy.idle import DeviceFacts
from meshnode.sim.world import World
from meshnode.state.audit import NoAudit


def library(world: World, name: str) -> LocalNode:
    return LocalNode(world[name].running, Commands(world[name].running))


async def seen(world: World, by: str, name: str) -> PeerStatus:
    """How one node sees another."""
    (row,) = [peer for peer in (await library(world, by).status()).peers if peer.name == name]
    return row


def layers_of(world: World, name: str) -> tuple[int, int] | None:
    serving = world[name].running.spans.serving
    return None if serving is None else (serving.span.first, serving.span.last)


async def mesh(world: World, nodes: int, memory: str) -> None:
    world.add(nodes, memory=memory)
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)


async def test_layers_are_given_away_before_they_go_and_an_answer_under_way_ends(
    world: World, autojump_clock: MockClock
) -> None:
    await mesh(world, 3, "2.2MB")  # two nodes can hold it all
    right = await world.ask("n1")
    (leaver,) = [name for name in ("n2", "n3") if layers_of(world, name)][:1]
    served = layers_of(world, leaver)
    long: list[int] = []

    async def ask() -> None:
        long.extend((await library(world, "n1").generate([5, 6, 7], max_tokens=400, temperature=0)).token_ids)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await world.until(lambda: world["n1"].running.origin.running > 0)
        now = await library(world, leaver).drain()
        assert (now.duty, now.ordered, now.until_ms) == ("drained", "drained", 0)
        assert "`meshnode resume` ends it" in now.why
        assert layers_of(world, leaver) == served  # until others have them
        await world.until(lambda: layers_of(world, leaver) is None)
    assert len(long) == 400 and long[:12] == right
    await world.until(world.all_ready)
    assert await world.ask("n1") == await world.ask(leaver) == right
    row = await seen(world, "n1", leaver)
    assert (row.duty, row.state, row.memory_bytes, row.first) == ("drained", "idle", 0, None)
    shown = describe(await library(world, "n1").status())
    assert "serves no layers, drained" in shown
    mine = describe(await library(world, leaver).status())
    assert "this node is drained, because somebody asked for it; `meshnode resume` ends it" in mine
    assert "does-not-fit" not in {warning.code for warning in (await library(world, leaver).status()).health}


async def test_an_order_outlives_a_restart_and_ends_by_itself_or_by_resume(
    world: World, autojump_clock: MockClock
) -> None:
    await mesh(world, 3, "2.2MB")
    await library(world, "n3").drain(600)
    await world.until(lambda: layers_of(world, "n3") is None)
    await world.leave("n3")
    await trio.sleep(100)
    await world.start("n3")
    await world.until(world.connected)
    status = await library(world, "n3").status()
    assert status.duty.duty == "drained" and "for 8 min more" in status.duty.why
    assert world["n3"].running.directory.me().memory_bytes == 0
    await trio.sleep(100)
    assert layers_of(world, "n3") is None
    await trio.sleep(450)  # the time is over
    assert (await library(world, "n3").status()).duty.duty == "full"
    assert (await seen(world, "n1", "n3")).memory_bytes > 0
    assert (await library(world, "n3").pause()).duty == "paused"
    assert (await library(world, "n3").drain()).duty == "drained"
    now = await library(world, "n3").resume()
    assert (now.duty, now.why, now.ordered) == ("full", "", "")
    await world.leave("n3")
    await world.start("n3")
    assert (await library(world, "n3").status()).duty.duty == "full"


async def test_a_paused_node_serves_and_makes_no_copies(world: World, autojump_clock: MockClock) -> None:
    world.add(2, memory="8MB")
    await world.start("n1", "n2")
    await world.until(world.connected)
    await library(world, "n2").pause()
    await world.publish("n1")
    await world.until(world.all_ready)
    await trio.sleep(120)
    held = len(world["n2"].running.inventory.holdings())
    copies = world["n1"].running.replication.copies()
    assert copies is not None and copies.fewest == 1
    assert (await seen(world, "n1", "n2")).duty == "paused"
    await library(world, "n2").resume()
    await world.until(lambda: (found := world["n1"].running.replication.copies()) is not None and found.fewest == 2)
    assert len(world["n2"].running.inventory.holdings()) >= held


async def test_a_mesh_that_can_not_do_without_a_node_is_told_and_the_node_obeys(
    world: World, autojump_clock: MockClock
) -> None:
    await mesh(world, 3, "1.4MB")  # all are needed
    await library(world, "n2").drain()
    await world.until(lambda: layers_of(world, "n2") is None)
    await world.until(lambda: not world["n1"].running.readiness.now.ready)
    await library(world, "n2").resume()
    await world.until(world.all_ready)


@pytest.mark.parametrize("seconds", [-1, MAX_S + 1, "1h", True, None])
async def test_a_time_that_is_none(world: World, autojump_clock: MockClock, seconds: object) -> None:
    world.add(1, memory="8MB")
    await world.start_all()
    with pytest.raises(BadRequest, match="it takes a number from 0"):
        await library(world, "n1").pause(seconds)  # type: ignore[arg-type] # wrong on purpose
    assert (await library(world, "n1").status()).duty.duty == "full"


async def test_the_owner_comes_first(world: World, autojump_clock: MockClock) -> None:
    """Its battery runs low: background work pauses, then its layers go; plugged in, all comes back."""
    world.add(3, memory="2.2MB")
    low = DeviceFacts(on_mains=False, battery_percent=20)
    for device in world.devices.values():
        device.facts = DeviceFacts(on_mains=True, battery_percent=20)
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    right = await world.ask("n1")
    world["n3"].facts = low
    await world.until(lambda: world["n3"].running.owner.duty is Duty.PAUSED)
    assert (await library(world, "n3").resume()).duty == "paused", "an order is not what pauses it"
    await trio.sleep(200)
    assert world["n3"].running.owner.duty is Duty.PAUSED
    await world.until(lambda: world["n3"].running.owner.duty is Duty.DRAINED)
    await world.until(lambda: layers_of(world, "n3") is None)
    await world.until(world.all_ready)
    assert await world.ask("n3") == right
    status = await library(world, "n3").status()
    assert status.duty.why == "its battery is at 20 % (owner.battery = 30)"
    assert "this node is drained, because its battery is at 20 %" in describe(status)
    world["n3"].facts = DeviceFacts(on_mains=True, battery_percent=21)
    await world.until(lambda: world["n3"].running.owner.duty is Duty.FULL, within_s=200)
    n3 = world["n3"].peer_id
    await world.until(lambda: duty_of(world["n1"].running.directory.live()[n3].tags) is Duty.FULL)


async def test_what_others_and_this_device_ask_is_noted(world: World, autojump_clock: MockClock) -> None:
    await mesh(world, 3, "1.4MB")
    kept: dict[str, list[tuple[str, str, str]]] = {}

    class Noting(NoAudit):
        def __init__(self, name: str) -> None:
            self.lines = kept[name] = []

        def note(self, via: str, who: str, what: str, text: str = "") -> None:
            assert not text
            self.lines.append((via, who, what))

    for name in world.devices:
        node = world[name].running
        node.parts = replace(node.parts, audit=Noting(name))
    await library(world, "n1").generate([5, 6, 7], max_tokens=3)
    await library(world, "n1").status()
    asker = world["n1"].peer_id
    assert ("socket", "this device", "generate") in kept["n1"]
    assert not [line for line in kept["n1"] if line[2] == "status"]
    assert ("mesh", asker, "layers for an answer") in kept["n2"]
    assert ("mesh", asker, "layers for an answer") in kept["n3"]
