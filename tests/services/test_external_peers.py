"""IPFS nodes outside the network: kept connected, asked last, served only when the owner says so."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ContentUnavailable, Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.net import heartbeat
from meshnode.net.libp2p import host as libp2p_host
from meshnode.net.port import Stream
from meshnode.services.content.service import ContentService
from meshnode.services.content.sources import Finder
from meshnode.services.external_peers import (
    FIRST_PAUSE_S,
    LAST_PAUSE_S,
    LINGER_S,
    MAX_CAME,
    ExternalPeers,
    ExternalSettings,
)
from meshnode.sim.network import MemoryHost, MemoryNetwork
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.messages import (
    PROTOCOL,
    Block,
    Entry,
    Message,
    MessageReader,
    Presence,
    PresenceType,
    WantType,
    decode,
    frame_parts,
)
from protocols.bitswap.server import Server
from protocols.ids import DAG_PB, RAW, Cid, PeerId, cid_from_bytes, cid_of, cid_to_bytes
from protocols.membership.messages import PROTOCOL as HELLO
from protocols.unixfs.builder import Builder, file_cid
from tests.refs import ref
from tests.services.membership_mesh import ECHO, open_mesh
from tests.unit.membership_actors import peer_of_key

pytestmark = pytest.mark.slow  # waits in real time

US, MEMBER, GUEST, OTHER = (peer_of_key(name) for name in ("us", "member", "guest", "other guest"))
SIZE = (3 << 20) + 17


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


class Peer:
    """A host with content, and what it looks like to others."""

    def __init__(self, network: MemoryNetwork, peer: PeerId, folder: Path) -> None:
        self.host: MemoryHost = network.host(peer)
        self.folder = folder / peer
        self.store = BlobStore(self.folder, 1 << 40)
        self.providers: list[PeerId] = []
        self.content: ContentService

    def add(self, data: bytes) -> Cid:
        path = self.folder / "payload"
        path.write_bytes(data)
        return self.store.add_file(path, pin="test")


class World:
    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.folder = folder
        self.nursery = nursery
        self.peers: list[Peer] = []

    async def start(
        self,
        peer: PeerId,
        *,
        guests: Sequence[PeerId] = (),
        share: bool = False,
        data: bytes = b"",
        finder: Finder | None = None,
    ) -> Peer:
        it = Peer(self.network, peer, self.folder)
        self.peers.append(it)
        for guest in guests:
            it.host.welcome(guest, (PROTOCOL,))
        rule = "guests" if share else "members"
        known = Known(it.host, it.providers, guests)
        it.content = content_of(it.host, it.store, known, share=rule, patience_s=5, finder=finder)
        if data:
            it.add(data)
        await self.nursery.start(it.host.run)
        await self.nursery.start(it.content.run)
        return it


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        it = World(folder, nursery)
        with trio.fail_after(600):
            yield it
        nursery.cancel_scope.cancel()
    for peer in it.peers:
        peer.store.close()


async def meet(one: Peer, other: Peer) -> None:
    await one.host.connect(other.host.peer_id, other.host.addresses)


@pytest.fixture
async def it(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_a_guest_gives_what_no_member_has(it: World) -> None:
    data = noise(SIZE)
    us = await it.start(US, guests=[GUEST])
    guest = await it.start(GUEST, guests=[US], share=True, data=data)
    await meet(us, guest)
    opened = await us.content.open(ref(file_cid(data), len(data)))
    assert opened.path.read_bytes() == data
    assert us.content.fetched_from[GUEST] > SIZE


async def test_members_are_asked_first(it: World) -> None:
    data = noise(SIZE)
    us = await it.start(US, guests=[GUEST])
    guest = await it.start(GUEST, guests=[US], share=True, data=data)
    member = await it.start(MEMBER, data=data)
    us.providers.append(MEMBER)
    for one, other in ((us, member), (member, us)):
        one.host.admit(other.host.peer_id, True)
    await meet(us, guest)
    await meet(us, member)
    await us.content.fetch(ref(file_cid(data), len(data)))
    assert us.content.fetched_from.keys() == {MEMBER}


@pytest.mark.parametrize("share", [False, True])
async def test_nothing_leaves_the_network_unless_the_owner_says_so(it: World, share: bool) -> None:
    data = noise(SIZE)
    us = await it.start(US, guests=[GUEST], share=share, data=data)
    guest = await it.start(GUEST, guests=[US])
    await meet(us, guest)
    if share:
        await guest.content.fetch(ref(file_cid(data), len(data)))
        assert us.content.served_to[GUEST] > SIZE
    else:
        with pytest.raises(ContentUnavailable, match="does not have it"):
            await guest.content.fetch(ref(file_cid(data), len(data)))
        assert us.content.bytes_served == 0


async def test_what_comes_later_is_not_shared_either(it: World) -> None:
    """A wish that waits is answered when its block comes, but not a guest's."""
    data = noise(SIZE)
    us = await it.start(US, guests=[GUEST])
    source = await it.start(OTHER, data=data, guests=[US], share=True)
    guest = await it.start(GUEST, guests=[US])
    us.providers.append(OTHER)
    us.host.admit(OTHER, True)
    await meet(us, guest)
    await meet(us, source)
    root = file_cid(data)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_fails, guest, root, len(data))
        await us.content.fetch(ref(root, len(data)))
    assert us.content.bytes_served == 0


async def _fails(peer: Peer, root: Cid, size: int) -> None:
    with pytest.raises(ContentUnavailable):
        await peer.content.fetch(ref(root, size))


async def test_the_error_names_the_guests_that_were_asked(it: World) -> None:
    us = await it.start(US, guests=[GUEST, OTHER])
    guest = await it.start(GUEST, guests=[US], share=True)
    await meet(us, guest)
    with pytest.raises(ContentUnavailable) as caught:
        await us.content.fetch(ref(cid_of(RAW, b"nowhere"), 7))
    assert "does not have it" in str(caught.value) and "not reachable" in str(caught.value)


async def test_a_stream_for_every_answer_is_no_broken_transfer(it: World, tmp_path: Path) -> None:
    """go-bitswap opens a stream for each answer and closes it; nothing is asked twice for that."""
    data = noise(SIZE)
    us = await it.start(US, guests=[GUEST])
    source = Peer(it.network, GUEST, tmp_path)
    it.peers.append(source)
    root = source.add(data)
    asked: list[bytes] = []

    async def answer(stream: Stream) -> None:
        reader = MessageReader()
        while piece := await stream.receive_some():
            for raw in reader.feed(piece):
                for entry in decode(raw).entries:
                    if entry.cancel:
                        continue
                    block = source.store.block(cid_from_bytes(entry.cid))
                    assert block is not None
                    if entry.want_type is WantType.HAVE:
                        back = Message(presences=(Presence(cid=entry.cid, type=PresenceType.HAVE),))
                    else:
                        asked.append(entry.cid)
                        back = Message(blocks=(Block(prefix=entry.cid[:4], data=block),))
                    out = await source.host.open_stream(US, PROTOCOL)
                    for part in frame_parts(back):
                        await out.send_all(bytes(part))
                    await out.aclose()

    source.host.handle(PROTOCOL, answer)
    source.host.welcome(US, (PROTOCOL,))
    await it.nursery.start(source.host.run)
    await us.host.connect(GUEST, source.host.addresses)
    opened = await us.content.open(ref(root, len(data)))
    assert opened.path.read_bytes() == data
    assert len(asked) == len(set(asked)) == 5  # the root and four leaves


async def test_a_guest_may_not_ask_for_anything_else(it: World, tmp_path: Path) -> None:
    us = Peer(it.network, US, tmp_path)
    it.peers.append(us)

    async def never(stream: Stream) -> None:
        raise AssertionError("served to a guest")

    us.host.handle("/meshnode/hello/1", never, open_to_strangers=True)
    us.host.handle("/meshnode/sync/1", never)
    us.host.welcome(GUEST, (PROTOCOL,))
    await it.nursery.start(us.host.run)
    guest = await it.start(GUEST)
    await meet(guest, us)
    for protocol in ("/meshnode/hello/1", "/meshnode/sync/1", PROTOCOL):
        with pytest.raises(Declined):
            await guest.host.open_stream(US, protocol)


def settings_of(*peers: MemoryHost) -> ExternalSettings:
    return ExternalSettings(
        addresses=tuple(address for peer in peers for address in peer.addresses), protocols=(PROTOCOL,)
    )


async def test_guests_are_dialled_again_ever_more_rarely(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    us, guest = network.host(US), network.host(GUEST)
    service = ExternalPeers(us, settings_of(guest), random.Random(1))
    assert service.configured == (GUEST,)
    await nursery.start(us.run)
    await nursery.start(service.run)
    await trio.sleep(300)
    assert "does not answer" in service.failures()[GUEST]
    await nursery.start(guest.run)
    with trio.fail_after(1.5 * LAST_PAUSE_S + 1):
        await connection(us, connected=True)
    assert us.peers == () and us.guests == (GUEST,)
    assert service.failures() == {}
    await trio.sleep(60)
    network.kill(GUEST)
    await connection(us, connected=False)
    await trio.lowlevel.checkpoint()
    guest = network.host(GUEST)
    await nursery.start(guest.run)
    with trio.fail_after(4 * FIRST_PAUSE_S):
        await connection(us, connected=True)


async def test_a_guest_out_of_reach_stands_in_the_health_until_it_comes(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = MemoryNetwork()
    us, guest = network.host(US), network.host(GUEST)
    health = Health(trio.current_time)
    service = ExternalPeers(us, settings_of(guest), random.Random(1), health=health, wall=lambda: 1_795_000_000_000)
    await nursery.start(us.run)
    await nursery.start(service.run)
    await trio.sleep(15)
    assert health.current() == []  # it may just be starting
    await trio.sleep(60)
    [shown] = health.current()
    assert shown.code == "guest-unreachable"
    for part in (guest.addresses[0].partition("/p2p/")[0], "since 2026-11-18 11:06 UTC", "content.ipfs_peers"):
        assert part in shown.text
    await nursery.start(guest.run)
    await connection(us, connected=True)
    assert health.current() == []
    network.kill(GUEST)
    await trio.sleep(30)
    [shown] = health.current()
    assert 20 < shown.since_s < 31


async def test_guests_are_added_moved_and_removed_while_it_runs(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    network = MemoryNetwork()
    us, guest, other = network.host(US), network.host(GUEST), network.host(OTHER)
    health = Health(trio.current_time)
    service = ExternalPeers(us, settings_of(), random.Random(1), health=health)
    for host in (us, guest):
        await nursery.start(host.run)
    await nursery.start(service.run)
    service.configure(GUEST, other.addresses, "content.ipfs_api")
    await trio.sleep(40)
    [shown] = health.current()
    assert "content.ipfs_api" in shown.text
    service.configure(GUEST, guest.addresses, "content.ipfs_api")
    with trio.fail_after(1.5 * LAST_PAUSE_S + 1):
        await connection(us, connected=True)
    assert service.configured == (GUEST,)
    assert health.current() == []
    service.release(GUEST, "content.ipfs_peers", "that setting does not name it")
    assert service.configured == (GUEST,)
    service.release(GUEST, "content.ipfs_api", "it has another name now")
    await connection(us, connected=False)
    assert (us.guests, service.configured) == ((), ())
    service.release(GUEST, "content.ipfs_api", "twice")
    await trio.sleep(100)
    assert (us.guests, us.peers, service.failures(), health.current()) == ((), (), {}, [])


async def connection(host: MemoryHost, *, connected: bool) -> None:
    """Wait until the guest is there, or is not."""
    events = host.guest_events()
    while (GUEST in host.guests) is not connected:
        await events.receive()
    await trio.testing.wait_all_tasks_blocked()


def test_wishes_of_guests_can_be_refused_in_words() -> None:
    server = Server(lambda cid: 5000, lambda peer: peer != GUEST)
    wish = Message(entries=(Entry(cid=cid_to_bytes(cid_of(RAW, b"x")), send_dont_have=True),))
    server.handle(GUEST, wish)
    answer = server.next()
    assert answer is not None and answer.blocks == ()
    assert [kind for _, kind in answer.presences] == [PresenceType.DONT_HAVE]
    assert not server.added([cid_to_bytes(cid_of(RAW, b"x"))])


async def test_wishes_by_cid_version_0_are_understood(it: World) -> None:
    """Kubo asks by the names that stand in the tree; the answer comes under the name that was asked."""
    data = noise(SIZE)
    builder = Builder(chunk=1 << 18, wrapped=True, old=True)
    builder.update(data)
    root, block = builder.finish().inner[-1]
    answers: list[Message] = []
    us = await it.start(US, guests=[GUEST], share=True)
    us.store.put_block(block, DAG_PB)
    guest = Peer(it.network, GUEST, it.folder)
    it.peers.append(guest)
    got = trio.Event()

    async def hear(stream: Stream) -> None:
        reader = MessageReader()
        while piece := await stream.receive_some():
            for raw in reader.feed(piece):
                answers.append(decode(raw))
                got.set()

    guest.host.handle(PROTOCOL, hear)
    guest.host.welcome(US, (PROTOCOL,))
    await it.nursery.start(guest.host.run)
    await meet(guest, us)
    stream = await guest.host.open_stream(US, PROTOCOL)
    missing = b"\x12\x20" + bytes(32)
    wishes = (Entry(cid=root[2:]), Entry(cid=missing, send_dont_have=True))
    for part in frame_parts(Message(entries=wishes)):
        await stream.send_all(bytes(part))
    await got.wait()
    await stream.aclose()
    (answer,) = answers
    assert [(b.prefix, bytes(b.data), b.cid()) for b in answer.blocks] == [(b"\x00\x70\x12\x20", block, root)]
    assert answer.presences == (Presence(cid=missing, type=PresenceType.DONT_HAVE),)


class Wire:
    """A TCP connection between two hosts that may stop passing bytes, as when a process is stopped."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.open = trio.Event()
        self.open.set()

    def cut(self) -> None:
        self.open = trio.Event()

    async def serve(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self.target)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, near, far, nursery.cancel_scope)
            await self._pass_on(far, near, nursery.cancel_scope)

    async def _pass_on(self, source: trio.SocketStream, sink: trio.SocketStream, over: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in source:
                await self.open.wait()
                await sink.send_all(data)
        over.cancel()


@pytest.mark.net
async def test_a_guest_that_hangs_is_dropped_and_dialled_again(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "GUEST", heartbeat.Rhythm(32, period_s=0.1, measure_s=0.1, silence_s=1.0))
    us, guest = (libp2p_host.open_host(bytes((number,)) * 32) for number in (1, 2))
    guest.welcome(us.peer_id, (PROTOCOL,))
    for host in (us, guest):
        await nursery.start(host.run)
    wire = Wire(int(guest.addresses[0].split("/")[4]))
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, wire.serve, [listener])
    port = listener.socket.getsockname()[1]
    service = ExternalPeers(
        us,
        ExternalSettings(addresses=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{guest.peer_id}",), protocols=(PROTOCOL,)),
        random.Random(1),
    )
    await nursery.start(service.run)
    events = us.guest_events()
    with trio.fail_after(60):
        assert (await events.receive()).connected
        with trio.move_on_after(1.5) as quiet:  # it says nothing but what it is asked for
            await events.receive()
        assert quiet.cancelled_caught
        wire.cut()
        event = await events.receive()
        assert (event.connected, event.reason) == (False, "no heartbeat for 1 s")
        wire.open.set()
        assert (await events.receive()).connected


@pytest.mark.net
async def test_a_guest_is_not_sent_away_as_a_stranger_is(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_host, "STRANGER_S", 0.3)
    us, guest, stranger = (libp2p_host.open_host(bytes((number,)) * 32) for number in (1, 2, 3))
    us.welcome(guest.peer_id, (PROTOCOL,))
    guest.welcome(us.peer_id, (PROTOCOL,))
    for host in (us, guest, stranger):
        await nursery.start(host.run)
    events = us.events()
    for host in (guest, stranger):
        await host.connect(us.peer_id, us.addresses)
    with trio.fail_after(20):
        up, down = [await events.receive() for _ in range(2)]
    assert [(event.peer, event.connected) for event in (up, down)] == [
        (stranger.peer_id, True),
        (stranger.peer_id, False),
    ]
    assert us.guests == (guest.peer_id,)


# Peers that are used, and peers that come


class Town:
    """Nodes that use peers, and peers."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self._nursery = nursery

    async def host(self, name: str) -> MemoryHost:
        host = self.network.host(peer_of_key(name))
        await self._nursery.start(host.run)
        return host

    async def us(self, *, anyone: bool = False) -> tuple[MemoryHost, ExternalPeers]:
        host = await self.host("us")
        settings = ExternalSettings(protocols=(PROTOCOL,), offers=(PROTOCOL,) if anyone else ())
        external = ExternalPeers(host, settings, random.Random(1))
        await self._nursery.start(external.run)
        return host, external


@pytest.fixture
async def town(nursery: trio.Nursery) -> Town:
    return Town(nursery)


async def silent(stream: Stream) -> None:
    await trio.sleep_forever()


async def test_a_peer_is_a_guest_as_long_as_anybody_wants_it(town: Town, autojump_clock: MockClock) -> None:
    us, external = await town.us()
    server = await town.host("server")
    us.handle("/a", silent)
    us.handle("/b", silent)
    async with external.use(server.peer_id, server.addresses, ["/a"]):
        async with external.use(server.peer_id, server.addresses, ["/b"]):
            await (await server.open_stream(US, "/a")).aclose()
            await (await server.open_stream(US, "/b")).aclose()
        await (await server.open_stream(US, "/a")).aclose()
        with pytest.raises(Declined):
            await server.open_stream(US, "/b")
    lingering = us.guests
    assert lingering == (server.peer_id,), "it stays for the next question"
    with pytest.raises(Declined):
        await server.open_stream(US, "/a")
    await trio.sleep(2 * LINGER_S)
    left = us.guests
    assert left == ()
    gone = peer_of_key("nobody")
    with pytest.raises(PeerUnreachable):
        async with external.use(gone, ["/ip4/10.9.9.9/tcp/1"]):
            pytest.fail("there is nobody")
    await trio.testing.wait_all_tasks_blocked()
    assert us.book.guests == {} and external._reasons == {}


async def test_a_peer_that_is_wanted_again_while_it_leaves_stays(town: Town, autojump_clock: MockClock) -> None:
    us, external = await town.us()
    server = await town.host("server")
    async with external.use(server.peer_id, server.addresses):
        pass
    await trio.sleep(LINGER_S)  # it leaves at this very moment
    async with external.use(server.peer_id, server.addresses, ["/a"]):
        await trio.testing.wait_all_tasks_blocked()
        assert us.guests == (server.peer_id,)


async def test_a_configured_peer_outlives_its_use_and_its_visit(town: Town, autojump_clock: MockClock) -> None:
    us, external = await town.us()
    server = await town.host("server")
    async with external.use(server.peer_id, server.addresses):
        external.configure(server.peer_id, server.addresses, "content.ipfs_api")
    await trio.sleep(2 * LINGER_S)
    assert us.guests == (server.peer_id,)
    assert us.book.guests[server.peer_id] == {PROTOCOL}
    async with external.use(server.peer_id, server.addresses, ["/a"]):
        external.release(server.peer_id, "content.ipfs_api", "it moved")
        await trio.sleep(2 * LINGER_S)
        assert us.guests == (server.peer_id,)
        assert us.book.guests[server.peer_id] == {"/a"}
    await trio.sleep(2 * LINGER_S)
    assert us.guests == ()


async def test_visitors_are_few_and_are_forgotten(town: Town, autojump_clock: MockClock) -> None:
    us, external = await town.us(anyone=True)
    us.handle(PROTOCOL, silent, open_to_strangers=True)
    us.handle("/members/only", silent)
    strangers = [await town.host(f"stranger {number}") for number in range(MAX_CAME + 2)]
    for host in strangers:
        await host.connect(US, us.addresses)
        assert external.take_in(host.peer_id)
        await trio.testing.wait_all_tasks_blocked()
    assert us.peers == () and len(us.guests) == MAX_CAME
    assert external.came == tuple(host.peer_id for host in strangers[2:])
    late = strangers[-1]
    await (await late.open_stream(US, PROTOCOL)).aclose()
    with pytest.raises(Declined):
        await late.open_stream(US, "/members/only")
    town.network.kill(late.peer_id)
    await trio.sleep(1)
    assert late.peer_id not in external.came and late.peer_id not in us.book.guests
    assert not external.take_in(late.peer_id), "it is not connected"


async def test_strangers_are_not_taken_in_unless_something_is_for_them(town: Town, autojump_clock: MockClock) -> None:
    us, external = await town.us()
    stranger = await town.host("stranger")
    await stranger.connect(US, us.addresses)
    assert not external.take_in(stranger.peer_id)
    assert us.peers == (stranger.peer_id,)


async def test_a_peer_without_our_protocol_is_taken_in_and_another_network_is_not(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_mesh(tmp_path) as mesh:
        ann = await mesh.found("ann")
        external = ExternalPeers(ann.host, ExternalSettings(offers=(PROTOCOL,), entrance=HELLO), random.Random(1))
        ann.membership._strangers = external
        ann.host.handle(PROTOCOL, silent, open_to_strangers=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(external.run)
            stranger = mesh.network.host(peer_of_key("stranger"))
            await nursery.start(stranger.run)
            await stranger.connect(ann.peer_id, ann.host.addresses)
            # It is served at once, before and after it has been looked at.
            await (await stranger.open_stream(ann.peer_id, PROTOCOL)).aclose()
            with trio.fail_after(5):
                events = ann.host.guest_events()
                while not external.came:
                    await events.receive()
            await trio.sleep(120)
            assert ann.host.guests == (stranger.peer_id,) and ann.host.peers == ()
            assert ann.membership.refusals == () and ann.membership.members() == {}
            await (await stranger.open_stream(ann.peer_id, PROTOCOL)).aclose()
            with pytest.raises(Declined):
                await stranger.open_stream(ann.peer_id, ECHO)
            # A node of another network speaks our protocol and is sent away; one with a ticket gets in.
            eve = await mesh.found("eve", network="elsewhere")
            await eve.connect(ann)
            await trio.sleep(20)
            assert eve.peer_id not in (*external.came, *ann.host.peers)
            assert [refusal.peer for refusal in ann.membership.refusals] == [eve.peer_id]
            bob = await mesh.enter("bob", mesh.ticket(ann))
            await trio.sleep(1)
            await bob.meet(ann)
            assert await bob.call(ann) == b"hello"
            nursery.cancel_scope.cancel()


async def test_by_default_a_peer_without_our_protocol_is_sent_away(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_mesh(tmp_path) as mesh:
        ann = await mesh.found("ann")
        ann.membership._strangers = ExternalPeers(ann.host, ExternalSettings(), random.Random(1))
        ann.host.handle(PROTOCOL, silent)
        async with trio.open_nursery() as nursery:
            stranger = mesh.network.host(peer_of_key("stranger"))
            await nursery.start(stranger.run)
            await stranger.connect(ann.peer_id, ann.host.addresses)
            with pytest.raises(Declined):
                await stranger.open_stream(ann.peer_id, PROTOCOL)
            await trio.sleep(30)
            assert ann.host.peers == ann.host.guests == ()
            assert [refusal.code for refusal in ann.membership.refusals] == ["stranger"]
            nursery.cancel_scope.cancel()
