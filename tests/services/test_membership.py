"""Who is let in, who is not, and what both sides are told."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined, IdentityError, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.paths import Paths
from meshnode.doctor.device_checks import check_membership
from meshnode.doctor.facts import membership_facts
from meshnode.doctor.finding import Level
from meshnode.membership.enrolment import open_ticket, withdraw_member
from meshnode.membership.identity import Identity
from meshnode.membership.joining import join
from meshnode.membership.network import load_network, save_network
from meshnode.membership.roll import roll
from meshnode.net.port import Stream
from meshnode.services.dialling import DiallingService
from meshnode.services.membership import REVIEW_S, Refusal
from meshnode.state.address_book import AddressBook
from meshnode.state.database import Database
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, short
from protocols.membership import HELLO, PROTOCOL, ROLES
from protocols.membership.messages import MAX_CLOCK_MS, TOPIC, Chain, Hello, Join, Message, Refused, Roster
from protocols.membership.renewal import id_of
from tests.adverts import Known
from tests.services.membership_mesh import ECHO, Mesh, Node, open_mesh


async def until(node: Node, condition: Callable[[], object]) -> None:
    """Wait until something that a node's membership service knows makes the condition true."""
    with trio.fail_after(30):
        while not condition():
            await node.membership.changes.wait()


async def refused(node: Node, peer: PeerId) -> Refusal:
    """The refusal that concerns a peer, once there is one."""
    await until(node, lambda: any(refusal.peer == peer for refusal in node.membership.refusals))
    return next(refusal for refusal in node.membership.refusals if refusal.peer == peer)


async def gone(node: Node, peer: PeerId) -> None:
    """Wait until a peer is not connected."""
    events = node.host.events()
    with trio.fail_after(30):
        while peer in node.host.peers:
            await events.receive()


async def answer_of(stream: Stream) -> Message | None:
    reader = FrameReader()
    while data := await stream.receive_some():
        for frame in reader.feed(data):
            return HELLO.decode(frame.header)
    return None


async def mesh_goes_on(*nodes: Node) -> None:
    """Every pair still admits each other and serves."""
    for node in nodes:
        for other in nodes:
            if node is not other:
                assert other.peer_id in node.membership.members()
                assert await node.call(other) == b"hello"


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with open_mesh(tmp_path) as made:
        yield made


@pytest.fixture
async def ann(mesh: Mesh) -> Node:
    """The founder."""
    return await mesh.found("ann")


@pytest.fixture
async def bob(mesh: Mesh, ann: Node) -> Node:
    """A member that has met her."""
    bob = await mesh.enter("bob", mesh.ticket(ann))
    await bob.meet(ann)
    return bob


async def test_two_commands_to_a_mesh(ann: Node, bob: Node, autojump_clock: MockClock) -> None:
    await mesh_goes_on(ann, bob)
    member = ann.membership.members()[bob.peer_id]
    assert (member.name, member.software, member.standing.roles) == ("bob", "0.1.0", {"ask", "serve", "publish"})
    assert bob.membership.roles_of(ann.peer_id) == set(ROLES)
    assert bob.membership.roles_of(bob.peer_id) == {"ask", "serve", "publish"} == bob.membership.standing.roles
    assert ann.membership.refusals == bob.membership.refusals == ()


async def test_nothing_is_served_before_the_hello(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    async with mesh.stranger("eve") as eve:
        await eve.connect(ann.peer_id, ann.host.addresses)
        with pytest.raises((Declined, PeerUnreachable)):
            stream = await eve.open_stream(ann.peer_id, ECHO)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b""
            raise PeerUnreachable("nothing came back")


async def test_a_silent_stranger_is_cut_off_and_the_mesh_goes_on(
    mesh: Mesh, ann: Node, bob: Node, autojump_clock: MockClock
) -> None:
    async with mesh.stranger("eve") as eve:
        await eve.connect(ann.peer_id, ann.host.addresses)
        refusal = await refused(ann, eve.peer_id)
        assert (refusal.code, refusal.by_us) == ("stranger", True)
        assert "within 5 s" in refusal.sentence and "ticket" in refusal.sentence
        await gone(ann, eve.peer_id)
    (shown,) = [warning for warning in ann.health.current() if warning.code == "refused-peer"]
    assert shown.text.startswith(f"{short(eve.peer_id)} was refused: it did not prove its membership within 5 s")
    await mesh_goes_on(ann, bob)


async def test_a_guest_is_not_asked_for_a_certificate(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    async with mesh.stranger("eve") as eve:
        ann.host.welcome(eve.peer_id, (ECHO,))
        await eve.connect(ann.peer_id, ann.host.addresses)
        await trio.sleep(300)
        assert ann.host.guests == (eve.peer_id,) and ann.host.peers == ()
        with pytest.raises(Declined):
            await eve.open_stream(ann.peer_id, PROTOCOL)
    assert ann.membership.refusals == () and ann.membership.members() == {}
    assert ann.health.current() == []


async def answer_to(mesh: Mesh, node: Node, name: str, chain: tuple[bytes, ...] | None) -> Refused:
    """What a node says to a device that comes with these certificates; without any at all: that says nothing."""
    network = load_network(node.folder).network_id
    async with mesh.stranger(name) as host:
        await host.connect(node.peer_id, node.host.addresses)
        stream = await host.open_stream(node.peer_id, PROTOCOL)
        if chain is not None:
            hello = Hello(
                network=network,
                nonce=bytes(16),
                chain=chain,
                software="x",
                name=name,
                wall_ms=mesh.wall(),
                secrets=(id_of(load_network(node.folder).secret),),  # it has seen one pass by,
            )
            await stream.send_all(pack(HELLO.encode(hello)))
        with trio.fail_after(10):
            answer = await answer_of(stream)
        assert isinstance(answer, Refused)
        assert (await refused(node, host.peer_id)).sentence == answer.reason
        return answer


@pytest.mark.parametrize("chain", [(), None])
async def test_a_stranger_is_told_why_in_words(
    mesh: Mesh, ann: Node, autojump_clock: MockClock, chain: tuple[bytes, ...] | None
) -> None:
    answer = await answer_to(mesh, ann, "eve", chain)
    assert (answer.code, "ticket" in answer.reason) == ("stranger", True)


async def test_tampered_and_borrowed_certificates(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    folder = await mesh.enrol("bob", mesh.ticket(ann))
    good = load_network(folder)
    assert "another node" in (await answer_to(mesh, ann, "eve", good.chain)).reason
    leaf = bytearray(good.chain[-1])
    leaf[-1] ^= 1
    bad = (*good.chain[:-1], bytes(leaf))
    answer = await answer_to(mesh, ann, "bob", bad)
    assert (answer.code, "does not hold" in answer.reason) == ("stranger", True)
    save_network(folder, replace(good, chain=bad))
    with pytest.raises(IdentityError, match="does not hold"):
        await mesh.start("bob")


@pytest.mark.parametrize("turn", ["one", "other"])
async def test_a_node_of_another_network_is_refused_on_both_sides(
    mesh: Mesh, ann: Node, bob: Node, autojump_clock: MockClock, turn: str
) -> None:
    eve = await mesh.found("eve", network="elsewhere")
    first, second = (ann, eve) if turn == "one" else (eve, ann)
    await first.connect(second)
    here, there = await refused(ann, eve.peer_id), await refused(eve, ann.peer_id)
    assert here.code == there.code == "other-network"
    assert here.sentence == there.sentence
    assert here.by_us is not there.by_us
    await gone(ann, eve.peer_id)
    await mesh_goes_on(ann, bob)


async def test_a_replayed_one_use_ticket(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    ticket = mesh.ticket(ann)
    bob = await mesh.enter("bob", ticket)
    await bob.meet(ann)
    with pytest.raises(Declined, match="was used once") as caught:
        await mesh.enrol("eve", ticket)
    assert caught.value.code == "invite-used"
    assert not (mesh.folder / "eve" / "network" / "network.cbor").exists()
    refusal = await refused(ann, mesh_peer(mesh, "eve"))
    assert (refusal.code, refusal.sentence) == ("invite-used", str(caught.value))
    await mesh_goes_on(ann, bob)


async def test_a_refusal_is_on_record_before_it_is_sent(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    """The refused peer may hang up as soon as it has read why, and its stream ends with its connection."""
    ticket = open_ticket(mesh.ticket(ann))
    order = Join(network=ticket.network, invite=bytes(16), secret=ticket.secret, name="eve", software="", wall_ms=1)
    on_record: list[list[str]] = []

    class Eve:
        peer = PeerId("12D3KooWEve")

        async def receive_some(self, max_bytes: int = 65536) -> bytes:
            return pack(HELLO.encode(order))

        async def send_all(self, data: bytes) -> None:
            on_record.append([refusal.peer for refusal in ann.membership.refusals])
            raise PeerUnreachable("eve hung up", peer=self.peer)

        async def reset(self) -> None:
            pass

    eve: Any = Eve()
    with suppress(PeerUnreachable):
        await ann.membership._answer(eve)
    assert on_record == [[Eve.peer]]


async def test_one_use_survives_a_restart_of_the_issuer(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    ticket = mesh.ticket(ann)
    await mesh.enrol("bob", ticket)
    await ann.stop()
    await mesh.start("ann")
    with pytest.raises(Declined) as caught:
        await mesh.enrol("eve", ticket)
    assert caught.value.code == "invite-used"


async def test_two_devices_at_once_with_one_ticket(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    ticket = mesh.ticket(ann)
    results: list[str] = []

    async def attempt(name: str) -> None:
        try:
            await mesh.enrol(name, ticket)
            results.append("in")
        except Declined as error:
            results.append(error.code)

    async with trio.open_nursery() as nursery:
        for name in ("bob", "cleo", "dan"):
            nursery.start_soon(attempt, name)
    assert sorted(results) == ["in", "invite-used", "invite-used"]


async def test_an_expired_ticket(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    ticket = mesh.ticket(ann, ttl_s=60)
    await trio.sleep(61)
    with pytest.raises(Declined, match="expired on") as caught:
        await mesh.enrol("bob", ticket)
    assert caught.value.code == "invite-expired"
    assert (await refused(ann, mesh_peer(mesh, "bob"))).code == "invite-expired"
    await ann.stop()
    with pytest.raises(Declined, match="expired on"):
        await mesh.enrol("bob", ticket)  # nobody is left to ask: our own clock decides


async def test_a_device_may_join_twice(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    ticket = mesh.ticket(ann)
    folder = await mesh.enrol("bob", ticket)
    before = load_network(folder)
    await mesh.enrol("bob", ticket)
    assert load_network(folder) == before
    (folder / "network" / "network.cbor").unlink()  # the answer was lost
    await mesh.enrol("bob", ticket)
    bob = await mesh.start("bob")
    await bob.meet(ann)


async def test_a_member_of_one_network_does_not_slip_into_another(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    eve = await mesh.found("eve", network="elsewhere")
    await mesh.enrol("bob", mesh.ticket(ann))
    with pytest.raises(IdentityError, match="'home'"):
        await mesh.enrol("bob", mesh.ticket(eve))


async def test_a_ticket_used_at_home(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    before = load_network(ann.folder)
    member = await join(ann.host, mesh.ticket(ann), folder=ann.folder, name="x", software="x", clock=mesh.wall)
    assert member == before


async def test_an_issuer_that_is_away(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    ticket = mesh.ticket(ann)
    await ann.stop()
    with pytest.raises(PeerUnreachable, match="Is meshnode running there"):
        await mesh.enrol("bob", ticket)


async def test_a_bootstrap_peer_in_the_ticket_can_not_redeem_it_but_does_no_harm(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    boot = await mesh.enter("boot", mesh.ticket(ann))
    ticket = mesh.ticket(ann, addresses=[*boot.host.addresses, *ann.host.addresses])
    bob = await mesh.enter("bob", ticket)
    await bob.meet(boot)
    later = mesh.ticket(ann, addresses=[*boot.host.addresses, *ann.host.addresses])
    await ann.stop()
    with pytest.raises(PeerUnreachable, match="redeemed at the node that made it"):
        await mesh.enrol("cleo", later)


async def test_an_invited_inviter_invites(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann, roles=ROLES))
    cleo = await mesh.enter("cleo", mesh.ticket(bob, roles=("serve",)))
    await cleo.meet(ann)
    assert ann.membership.roles_of(cleo.peer_id) == {"ask", "serve"}


async def test_a_member_that_is_put_out_leaves_every_node(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob, cleo = [await mesh.enter(name, mesh.ticket(ann)) for name in ("bob", "cleo")]
    for one, other in ((bob, ann), (cleo, ann), (bob, cleo)):
        await one.meet(other)
    await ann.membership.withdraw(bob.peer_id, (), "it was stolen")
    for node in (ann, cleo):
        await gone(node, bob.peer_id)
        refusal = await refused(node, bob.peer_id)
        assert (refusal.code, "it was stolen" in refusal.sentence) == ("forbidden", True)
    await bob.connect(cleo)
    assert "it was stolen" in (await refused(bob, cleo.peer_id)).sentence
    await mesh_goes_on(ann, cleo)
    assert ann.membership.roles_of(bob.peer_id) == frozenset()
    (bob.folder / "network" / "network.cbor").unlink()
    await bob.stop()
    mesh.wall.skew_ms = -60_000
    early = mesh.ticket(ann)
    mesh.wall.skew_ms = 0
    with pytest.raises(Declined) as caught:  # a ticket from before it was put out does not help
        await mesh.enrol("bob", early)
    assert caught.value.code == "forbidden"


@pytest.mark.parametrize("away", [False, True])
async def test_who_was_put_out_is_told_on_its_own_device(
    mesh: Mesh, ann: Node, bob: Node, away: bool, autojump_clock: MockClock
) -> None:
    """At once, or when it comes back; and after that without anybody else."""
    if away:
        await bob.stop()
        await ann.membership.withdraw(bob.peer_id, (), "it was sold")
        bob = await mesh.start("bob")
        await bob.connect(ann)
    else:
        assert not bob.health.current()
        await ann.membership.withdraw(bob.peer_id, (), "it was sold")
        await gone(bob, ann.peer_id)
        await bob.connect(ann)
    await until(bob, lambda: not bob.membership.roles_of(bob.peer_id))
    (warning,) = (shown for shown in bob.health.current() if shown.code == "put-out")
    assert "it was sold" in warning.text and "meshnode join TICKET --anew" in warning.text
    ours = roll(load_network(bob.folder), bob.database, bob.peer_id, bob.wall())[0]
    assert ours.was_put_out and "it was sold" in ours.why_not
    facts, problem, _ = membership_facts(bob.folder, bob.peer_id, bob.wall())
    finding = check_membership(facts, bob.wall())
    assert (problem, finding.level) == ("", Level.WRONG)
    assert "it was sold" in finding.text and "join TICKET --anew" in finding.remedy
    await bob.stop()
    with pytest.raises(IdentityError, match=r"it was sold.*join TICKET --anew"):
        await mesh.start("bob")
    ticket = mesh.ticket(ann)
    async with mesh.stranger("bob") as host:
        await join(host, ticket, folder=bob.folder, name="bob", software="0.1.0", anew=True, clock=mesh.wall)
    bob = await mesh.start("bob")
    await bob.meet(ann)
    assert not bob.health.current()


async def test_a_certificate_that_expires_is_told_on_its_own_device(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann, member_ttl_s=60))
    await bob.meet(ann)
    await trio.sleep(60 + REVIEW_S)
    assert [shown.code for shown in bob.health.current() if shown.code == "put-out"] == ["put-out"]


async def test_a_new_ticket_lets_a_withdrawn_member_in_again(
    mesh: Mesh, ann: Node, bob: Node, autojump_clock: MockClock
) -> None:
    await ann.membership.withdraw(bob.peer_id, (), "by mistake")
    await gone(ann, bob.peer_id)
    await bob.stop()
    await trio.sleep(1)
    (bob.folder / "network" / "network.cbor").unlink()
    again = await mesh.enter("bob", mesh.ticket(ann))
    await again.meet(ann)


async def test_withdrawn_roles_are_gone_at_once_and_the_connection_stays(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    ticket = mesh.ticket(ann)
    bob = await mesh.enter("bob", ticket)
    await bob.meet(ann)
    withdraw_member(ann.folder, ann.database, bob.peer_id, keeps=("serve",), reason="too slow", clock=mesh.wall)
    with trio.fail_after(REVIEW_S + 1):
        await until(ann, lambda: ann.membership.members()[bob.peer_id].standing.roles == {"ask", "serve"})
        await until(bob, lambda: bob.membership.standing.roles == {"ask", "serve"})
    await mesh_goes_on(ann, bob)
    await bob.stop()
    (bob.folder / "network" / "network.cbor").unlink()
    with pytest.raises(Declined, match="rights of"):  # its old ticket does not give them back
        await mesh.enrol("bob", ticket)


async def test_a_withdrawal_is_learned_from_whoever_is_met_and_survives_a_restart(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    bob, cleo = [await mesh.enter(name, mesh.ticket(ann)) for name in ("bob", "cleo")]
    await bob.meet(cleo)
    await ann.membership.withdraw(bob.peer_id, (), "sold")
    await cleo.meet(ann)
    await gone(cleo, bob.peer_id)
    await ann.stop()
    await cleo.stop()
    cleo = await mesh.start("cleo")
    await bob.connect(cleo)
    assert (await refused(cleo, bob.peer_id)).code == "forbidden"


async def test_only_news_of_withdrawals_are_passed_on(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob, cleo, dora = [await mesh.enter(name, mesh.ticket(ann)) for name in ("bob", "cleo", "dora")]
    for one, other in ((bob, ann), (cleo, ann), (bob, cleo), (dora, ann)):
        await one.meet(other)
    await ann.membership.withdraw(dora.peer_id, (), "it was stolen")
    for node in (ann, bob, cleo):
        await gone(node, dora.peer_id)
    await mesh_goes_on(ann, cleo)
    known = [roster for roster in ann.membership._registry.rosters(()) if roster.withdrawals]
    assert known
    before = {node.name: node.host.sent for node in (ann, cleo)}
    for _ in range(200):
        for roster in known:
            await bob.host.publish(TOPIC, HELLO.encode(roster))
        await bob.host.publish(TOPIC, HELLO.encode(Roster(members=(Chain(certificates=(bytes(100),)),))))
        await bob.host.publish(TOPIC, b"no roster at all")
        await trio.sleep(0.01)
    assert {node.name: node.host.sent for node in (ann, cleo)} == before
    await ann.membership.withdraw(bob.peer_id, (), "it babbles")
    for node in (ann, cleo):
        await gone(node, bob.peer_id)


async def test_who_may_not_withdraw(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann))
    inviter = await mesh.enter("cleo", mesh.ticket(ann, roles=ROLES))
    await bob.meet(ann)
    await inviter.meet(ann)
    await until(inviter, lambda: inviter.membership.roles_of(bob.peer_id))
    with pytest.raises(IdentityError, match="lacks the role invite"):
        await bob.membership.withdraw(ann.peer_id, (), "")
    for target in (ann.peer_id, bob.peer_id):
        with pytest.raises(IdentityError, match="as near to the founder"):
            await inviter.membership.withdraw(target, (), "")


async def test_a_certificate_that_expires_while_connected(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann, member_ttl_s=60))
    await bob.meet(ann)
    await trio.sleep(40)
    await mesh_goes_on(ann, bob)
    refusal = await refused(ann, bob.peer_id)
    assert refusal.code == "expired"
    await gone(ann, bob.peer_id)


async def test_roles_of_members_that_were_never_met(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann, roles=("publish",)))
    await bob.meet(ann)
    await bob.stop()
    bob_id = bob.peer_id
    cleo = await mesh.enter("cleo", mesh.ticket(ann))
    await cleo.meet(ann)
    await until(cleo, lambda: cleo.membership.roles_of(bob_id) == {"publish"})
    await cleo.stop()
    cleo = await mesh.start("cleo")
    assert cleo.membership.roles_of(bob_id) == {"publish"}
    assert cleo.membership.roles_of(PeerId("nobody")) == frozenset()


async def test_the_larger_id_asks_when_the_smaller_one_does_not(
    mesh: Mesh, ann: Node, autojump_clock: MockClock
) -> None:
    await mesh.enrol("bob", mesh.ticket(ann))
    await ann.stop()
    small, large = sorted(("ann", "bob"), key=lambda name: mesh_peer(mesh, name))
    quiet, asking = await mesh.start(small, passive=True), await mesh.start(large)
    await quiet.meet(asking)
    await mesh_goes_on(quiet, asking)


def mesh_peer(mesh: Mesh, name: str) -> PeerId:
    return Identity.load(mesh.folder / name).peer_id


async def test_both_dial_at_the_same_time(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ann.meet, bob)
        nursery.start_soon(bob.meet, ann)
    await mesh_goes_on(ann, bob)
    assert ann.membership.refusals == bob.membership.refusals == ()


async def test_a_member_that_comes_back_is_admitted_again(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    bob = await mesh.enter("bob", mesh.ticket(ann))
    for _ in range(3):
        await bob.meet(ann)
        await bob.stop()
        await gone(ann, bob.peer_id)
        await until(ann, lambda: not ann.membership.members())
        bob = await mesh.start("bob")
    await bob.meet(ann)
    await mesh_goes_on(ann, bob)


@pytest.mark.parametrize("junk", [b"\xff" * 64, bytes(8), b"\0\0\0\4\0\0\0\0abcd", b"\0\1\0\0\0\0\0\0" + bytes(100)])
async def test_a_broken_peer_costs_us_its_connection_and_nothing_else(
    mesh: Mesh, ann: Node, bob: Node, autojump_clock: MockClock, junk: bytes
) -> None:
    async with mesh.stranger("eve") as eve:
        await eve.connect(ann.peer_id, ann.host.addresses)
        stream = await eve.open_stream(ann.peer_id, PROTOCOL)
        await stream.send_all(junk)
        assert (await refused(ann, eve.peer_id)).code == "stranger"
        await gone(ann, eve.peer_id)
    await mesh_goes_on(ann, bob)


async def test_clocks_that_differ(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    for name in ("bob", "cleo"):
        await mesh.enrol(name, mesh.ticket(ann))
    bob = await mesh.start("bob", skew_ms=5_000)
    await bob.meet(ann)
    assert [shown.code for shown in ann.health.current()] == ["clock-off"]
    cleo = await mesh.start("cleo", skew_ms=2 * MAX_CLOCK_MS)
    await cleo.connect(ann)
    assert (await refused(ann, cleo.peer_id)).code == (await refused(cleo, ann.peer_id)).code == "clock"


async def test_repeated_refusals_are_counted_not_piled_up(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    eve = await mesh.found("eve", network="elsewhere")
    for _ in range(3):
        await ann.connect(eve)
        await gone(ann, eve.peer_id)
        await gone(eve, ann.peer_id)
    (refusal,) = ann.membership.refusals
    assert refusal.count == 3


async def test_a_refused_node_is_not_dialled_in_a_loop_and_knows_why(
    mesh: Mesh, ann: Node, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    eve = await mesh.found("eve", network="elsewhere")
    discovery = DiallingService(
        eve.host, AddressBook(eve.database, ann.host.addresses, eve.wall), Known(), Health(), random.Random(1)
    )
    await nursery.start(discovery.run)
    await trio.sleep(120)
    (refusal,) = ann.membership.refusals
    assert refusal.code == "other-network"
    assert 3 <= refusal.count <= 16
    assert "another network" in discovery.failures()[ann.peer_id]


async def test_secrets_stay_out_of_the_ledger_file(mesh: Mesh, ann: Node, autojump_clock: MockClock) -> None:
    secret = load_network(ann.folder).secret
    bob = await mesh.enter("bob", mesh.ticket(ann))
    assert load_network(bob.folder).secret == secret
    await ann.stop()
    assert all(secret not in file.read_bytes() for file in ann.folder.glob("state.sqlite*"))
    with Database(Paths(ann.folder).state) as database:
        assert [invite.used for invite in database.invites()] == [1]
