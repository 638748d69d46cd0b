"""Pairing by a PIN, between a member and a device that belongs nowhere yet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import ConfigError, Declined, IdentityError, PeerUnreachable
from meshnode.membership.joining import join
from meshnode.membership.pairing import read_address, read_pin, ticket_by_pin
from meshnode.services.pairing import Paired, Pairing
from meshnode.sim.network import MemoryHost
from protocols.pairing.messages import OPEN_S, PROTOCOL
from tests.services.membership_mesh import Mesh, Node, open_mesh


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with open_mesh(tmp_path) as made:
        yield made


@pytest.fixture
async def ann(mesh: Mesh) -> Node:
    """The founder."""
    return await mesh.found("ann")


async def typed(host: MemoryHost, ann: Node, pin: str, name: str = "kitchen") -> str:
    return await ticket_by_pin(host, ann.host.addresses[0], pin, name=name)


def other_than(pin: str) -> str:
    return f"{(int(pin) + 1) % 1_000_000:06}"


async def test_a_device_is_let_in_by_the_pin_and_is_a_member(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    async with ann.pairing.open(["serve", "publish"]) as pairing, mesh.stranger("bob") as host:
        ticket = await typed(host, ann, pairing.pin)
        assert await pairing.outcome() == Paired(peer=host.peer_id, name="kitchen")
        await join(host, ticket, folder=mesh.folder / "bob", name="bob", software="0.1.0", clock=mesh.wall)
    bob = await mesh.start("bob")
    await bob.meet(ann)
    assert ann.membership.roles_of(bob.peer_id) == {"ask", "serve", "publish"}
    (invite,) = ann.database.invites()
    assert invite.used_up and not invite.revoked_ms


async def test_strangers_can_speak_it_only_while_it_is_open(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    async with mesh.stranger("bob") as host:
        with pytest.raises(Declined, match="lets nobody in by a PIN now") as no:
            await typed(host, ann, "123456")
        assert no.value.code == "pairing-closed"
        async with ann.pairing.open() as pairing:
            await typed(host, ann, pairing.pin)
            with pytest.raises(Declined, match="lets nobody in by a PIN now"):
                await typed(host, ann, pairing.pin)  # it closes with the first device


async def test_three_wrong_pins_close_it_and_the_ticket_is_worthless(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    async with mesh.stranger("eve") as host:
        with pytest.raises(Declined, match="3 wrong PINs were typed"):
            async with ann.pairing.open() as pairing:
                for words in ("2 more times", "1 more time", "for the last time"):
                    with pytest.raises(Declined, match=words):
                        await typed(host, ann, other_than(pairing.pin))
                with pytest.raises(Declined, match="nobody in by a PIN now"):
                    await typed(host, ann, pairing.pin)
                await pairing.outcome()
        (invite,) = ann.database.invites()
        assert invite.revoked_ms and not invite.used
        async with ann.pairing.open() as again:
            await typed(host, ann, again.pin)


async def test_two_minutes_close_it(ann: Node, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(Declined, match="no device came with the right PIN within 120 s"):
        async with ann.pairing.open() as pairing:
            await pairing.outcome()
    assert trio.current_time() - began == pytest.approx(OPEN_S)


async def test_of_two_devices_with_the_pin_one_gets_a_ticket(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    tickets: list[str] = []
    noes: list[str] = []

    async def come(host: MemoryHost, pairing: Pairing) -> None:
        try:
            tickets.append(await typed(host, ann, pairing.pin))
        except Declined as no:
            noes.append(no.code)

    async with (
        mesh.stranger("bob") as bob,
        mesh.stranger("eve") as eve,
        ann.pairing.open() as pairing,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(come, bob, pairing)
        nursery.start_soon(come, eve, pairing)
    assert len(tickets) == 1
    assert noes == ["pairing-closed"]


async def test_who_may_not_invite_opens_nothing(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann))
    with pytest.raises(IdentityError, match="may not invite"):
        async with bob.pairing.open():
            pass
    with pytest.raises(ConfigError, match="nonsense"):
        async with ann.pairing.open(["nonsense"]):
            pass
    async with ann.pairing.open():
        with pytest.raises(Declined, match="open on this node already"):
            async with ann.pairing.open():
                pass


async def test_who_hangs_up_or_talks_nonsense_uses_up_nothing(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    async with mesh.stranger("eve") as host, ann.pairing.open() as pairing:
        for words in (b"", b"\0\0\0\4\0\0\0\0nope", bytes(100)):
            await host.connect(ann.peer_id, ann.host.addresses)
            stream = await host.open_stream(ann.peer_id, PROTOCOL)
            await stream.send_all(words)
            await stream.reset()
        await trio.sleep(1)
        assert pairing.wrong == 0
        await typed(host, ann, pairing.pin)


async def test_nobody_there(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    address = ann.host.addresses[0]
    await ann.stop()
    async with mesh.stranger("bob") as host:
        with pytest.raises(PeerUnreachable):
            await ticket_by_pin(host, address, "123456", name="")


def test_a_pin_as_people_type_it() -> None:
    assert read_pin(" 123 456\n") == read_pin("123-456") == "123456"
    for wrong in ("12345", "1234567", "12345O", ""):
        with pytest.raises(ConfigError, match="6 digits"):
            read_pin(wrong)


@pytest.mark.parametrize("text", ["", "192.168.1.5", "/ip4/192.0.2.1/tcp/4331", "/ip4/192.0.2.1/tcp/4331/p2p/bob"])
def test_an_address_names_its_peer(text: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a node"):
        read_address(text)
