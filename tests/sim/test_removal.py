"""A member that is put out is out everywhere within 15 s, and stays out: whole nodes in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined, TransientError
from meshnode.services.inference.queue import UNSETTLED_S
from meshnode.sim.world import Device, World
from protocols.membership.messages import WITHDRAWAL
from protocols.pipe.messages import Open
from tests.sim.coverage import span_of

OUT_S: Final = 15.0


async def mesh(world: World) -> tuple[list[Device], Device]:
    """Three honest devices that serve the owner's model together, and a guest with every right but to invite."""
    (owner,) = world.add(memory="1.4MB")
    honest = [owner, *world.add(2, memory="1.4MB", roles=("serve",), by="n1")]
    (guest,) = world.add(memory="1.4MB", roles=("serve", "publish"), by="n1")
    await world.start_all()
    await world.publish("n1")
    await world.until(lambda: world.all_ready() and world.connected())
    return honest, guest


def out(device: Device, guest: Device) -> bool:
    """Whether nothing of the guest is left at a device."""
    node = device.running
    return (
        guest.peer_id not in node.host.peers
        and guest.peer_id not in node.directory.live()
        and guest.peer_id not in node.membership.members()
        and not node.membership.roles_of(guest.peer_id)
        and all(one.peer != guest.peer_id for one in node.directory.ranked())
        and all(opened.origin != guest.peer_id for opened in openings(device))
    )


def openings(device: Device) -> list[Open]:
    """The sessions that are open on a device's stage."""
    return [session.machine.opening for session in device.running.stage._sessions.values()]


async def test_connections_sessions_adverts_and_heads_end_within_15_s(
    world: World, autojump_clock: MockClock
) -> None:
    honest, guest = await mesh(world)
    right = await world.ask("n1")
    ended = trio.Event()

    async def ask_on_and_on() -> None:
        with pytest.raises((Declined, TransientError)):
            while True:
                await world.ask(guest.name, max_tokens=2000)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_on_and_on)
        await world.until(lambda: any(openings(device) for device in honest))
        await honest[0].running.membership.withdraw(guest.peer_id, (), "it was sold")
        took = await world.until(lambda: all(out(device, guest) for device in honest), within_s=OUT_S)
        assert took < OUT_S
        with trio.fail_after(UNSETTLED_S + OUT_S):  # its own device waits for a chain that may be built anew
            await ended.wait()
    await world.until(world_ready(world, guest))
    for device in honest:
        assert await world.ask(device.name) == right
    # It comes again and again, under its old certificate.
    for _ in range(60):
        await trio.sleep(1)
        assert all(out(device, guest) for device in honest)


async def test_it_stays_out_when_everybody_has_started_again(world: World, autojump_clock: MockClock) -> None:
    """Of those that were down, one has not heard of it before it meets the guest."""
    honest, guest = await mesh(world)
    owner, second, third = honest
    await world.crash(third.name)
    await owner.running.membership.withdraw(guest.peer_id, (), "it was sold")
    await world.until(lambda: out(owner, guest) and out(second, guest), within_s=OUT_S)
    await world.crash(owner.name, second.name, guest.name)
    for signer in guest.state.records(WITHDRAWAL):  # its owner has it forget what it was told
        guest.state.remove_record(WITHDRAWAL, signer)
    await world.start(third.name, guest.name)
    await world.until(lambda: guest.peer_id in third.running.membership.members())
    await world.start(second.name)
    await world.until(lambda: out(third, guest) and out(second, guest), within_s=OUT_S)
    await world.start(owner.name)
    await world.until(world_ready(world, guest))
    await trio.sleep(30)
    assert all(out(device, guest) for device in honest)


async def test_the_head_of_who_was_put_out_has_no_effect_although_it_was_served(
    world: World, autojump_clock: MockClock
) -> None:
    world.add(memory="3MB")
    (guest,) = world.add(memory="3MB", roles=("serve", "publish"), by="n1")
    (third,) = world.add(memory="3MB", roles=("serve",), by="n1")
    await world.start_all()
    await world.publish(guest.name)
    await world.until(lambda: world.all_ready() and span_of(third) is not None)
    await world["n1"].running.membership.withdraw(guest.peer_id, (), "")
    await world.until(lambda: third.running.releases.current is None and span_of(third) is None, within_s=OUT_S)
    assert world["n1"].running.releases.current is None
    await world.crash(third.name)
    await world.start(third.name)
    await trio.sleep(20)
    assert third.running.releases.current is None


def world_ready(world: World, guest: Device) -> Callable[[], bool]:
    """All but the guest answer."""
    return lambda: all(device.running.readiness.now.ready for device in world.up if device is not guest)
