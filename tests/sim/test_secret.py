"""A network whose secret is renewed: whole nodes in virtual time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from meshnode.membership.secrets import keep_secrets, known_secrets
from meshnode.sim.world import Device, World
from protocols.membership import Secret
from protocols.membership.renewal import sign_renewal


def renew(world: World, device: Device, secret: bytes = b"n" * 32) -> Secret:
    """What `meshnode members renew-secret` puts into the state of a founder's device."""
    membership = device.membership
    known = known_secrets(membership, device.state, world.wall())
    new = sign_renewal(device.identity.signing_key, membership.network_id, secret, world.wall(), membership.chain)
    keep_secrets(device.state, known.plus(new))
    return new


def all_have(devices: Iterable[Device], secret: Secret) -> bool:
    return all(device.running.membership.secrets.present.id == secret.id for device in devices)


async def mesh(world: World, guests: int) -> list[Device]:
    (owner,) = world.add(memory="8MB")
    others = world.add(guests, memory="0B", roles=("serve",), by="n1")
    await world.start_all()
    await world.publish("n1")
    await world.until(lambda: world.all_ready() and world.connected())
    return [owner, *others]


async def test_whoever_is_there_gets_it_and_nobody_is_disturbed(world: World, autojump_clock: MockClock) -> None:
    devices = await mesh(world, 4)
    answers = await world.ask("n3", max_tokens=50)
    renewed = renew(world, devices[0])
    await devices[0].running.membership.take_up()
    await world.until(lambda: all_have(devices, renewed), within_s=15)
    assert world.connected() and world.all_ready()
    assert await world.ask("n3", max_tokens=50) == answers
    again = renew(world, devices[0], b"m" * 32)
    await world.until(lambda: all_have(devices, again), within_s=15)  # the node looks by itself


async def test_who_was_away_gets_it_from_whoever_is_met_and_keeps_it(world: World, autojump_clock: MockClock) -> None:
    devices = await mesh(world, 3)
    owner, second, _, away = devices
    await world.crash(away.name)
    for number in range(3):
        renewed = renew(world, owner, bytes([number]) * 32)
        await world.until(lambda renewed=renewed: all_have(devices[:3], renewed), within_s=15)
    await world.crash(owner.name)
    await world.start(away.name)
    await world.until(lambda: all_have([away], renewed), within_s=15)
    await world.crash(away.name, second.name)
    await world.start(away.name, second.name)
    assert all_have([away, second], renewed), "it is kept"
    await world.until(world.connected)


async def test_two_halves_that_renewed_it_apart_agree_when_they_meet(world: World, autojump_clock: MockClock) -> None:
    devices = await mesh(world, 2)
    (twin,) = world.add(memory="0B")  # another founder's device
    await world.start(twin.name)
    await world.until(world.connected)
    left, right = devices[:2], [devices[2], twin]
    world.split([device.name for device in left], [device.name for device in right])
    one, other = renew(world, devices[0], b"1" * 32), renew(world, twin, b"2" * 32)
    await world.until(lambda: all_have(left, one) and all_have(right, other), within_s=15)
    world.network.heal()
    last = max(one, other, key=lambda secret: secret.rank)
    await world.until(lambda: all_have([*devices, twin], last) and world.connected())


@pytest.mark.parametrize("guilty", [True, False], ids=["put out", "a stranger with a leaked key"])
async def test_who_is_no_member_does_not_get_it(world: World, autojump_clock: MockClock, guilty: bool) -> None:
    """A stranger has the old secret, and a certificate that nobody has seen, signed with the key of an inviter."""
    devices = await mesh(world, 2)
    owner, _, guest = devices
    (inviter,) = world.add(memory="0B", by="n1")
    await world.start(inviter.name)
    await world.until(world.connected)
    if guilty:
        outsider = guest
        await owner.running.membership.withdraw(guest.peer_id, (), "")
        inside = [owner, devices[1], inviter]
    else:
        (outsider,) = world.add(memory="0B", roles=("serve",), by=inviter.name)
        inside = [*devices, inviter]
    renewed = renew(world, owner)
    await world.until(lambda: all_have(inside, renewed), within_s=15)
    if not guilty:
        await world.start(outsider.name)
    for _ in range(30):
        await trio.sleep(1)
        assert not all_have([outsider], renewed)
        assert all(outsider.peer_id not in device.running.membership.members() for device in inside)
    told = [refusal.sentence for refusal in owner.running.membership.refusals if refusal.peer == outsider.peer_id]
    assert any(("withdrawn" if guilty else "was replaced") in sentence for sentence in told)


async def test_a_new_member_gets_the_present_one(world: World, autojump_clock: MockClock) -> None:
    devices = await mesh(world, 1)
    renewed = renew(world, devices[0])
    await world.until(lambda: all_have(devices, renewed), within_s=15)
    (late,) = world.add(memory="0B", roles=("serve",), by="n1")
    late.membership = replace(late.membership, secret=renewed.secret, renewal=renewed.renewal)  # as it is granted
    await world.start(late.name)
    await world.until(lambda: world.connected() and all_have([*devices, late], renewed))
