"""Finding providers by the DHT: real services on an in-memory network, in virtual time where no disk is involved."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

from meshnode.core.errors import ConfigError, ContentUnavailable, Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.net.memory_host import MemoryHost, MemoryNetwork
from meshnode.net.port import Stream
from meshnode.services import visits
from meshnode.services.content.fetch import ContentService
from meshnode.services.dht import (
    ASK_SECONDS,
    LOOK_SECONDS,
    MAX_CARRIERS,
    PROVIDE_SECONDS,
    SEARCH_PAUSE_SECONDS,
    RoutingService,
)
from meshnode.services.visits import LINGER_SECONDS, MAX_LINGERING, MAX_VISITORS, Visits
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.messages import PROTOCOL as BITSWAP
from protocols.ids import RAW, Cid, PeerId, cid_of, cid_to_bytes
from protocols.kad.address import peer_bytes
from protocols.kad.lookup import K
from protocols.kad.messages import (
    LAN_PROTOCOL,
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    Kind,
    Message,
    MessageReader,
    Peer,
    block_key,
    decode,
    frame,
)
from protocols.kad.server import RECORD_SECONDS
from protocols.membership.messages import PROTOCOL as HELLO
from protocols.protobuf import put_varint
from tests.services.membership_mesh import ECHO, open_mesh
from tests.services.test_external_peers import noise
from tests.services.test_external_peers import world as content_world
from tests.unit.membership_actors import peer_of_key

US, PROVIDER = peer_of_key("us"), peer_of_key("provider")
CID = cid_of(RAW, b"a block")
KEY = block_key(cid_to_bytes(CID))


class Node:
    """A host with its part of the DHT."""

    def __init__(
        self,
        host: MemoryHost,
        seeds: Sequence[str],
        *,
        serve: bool = False,
        provides: Sequence[Cid] = (),
        anyone: bool = False,
        known: Sequence[PeerId] = (),
    ) -> None:
        self.host = host
        self.health = Health(trio.current_time)
        self.known = set(known)
        self.provides = list(provides)
        offers = ((BITSWAP,) if anyone else ()) + ((LAN_PROTOCOL,) if serve else ())
        self.visits = Visits(host, lambda peer: False, self.known.__contains__, offers)
        self.routing = RoutingService(
            host,
            self.visits,
            self.known.__contains__,
            seeds,
            (BITSWAP,),
            random.Random(1),
            provides=lambda: self.provides,
            serve=serve,
            health=self.health,
        )

    @property
    def parts(self) -> tuple[Callable[..., Awaitable[None]], ...]:
        return self.host.run, self.visits.run, self.routing.run


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.nursery = nursery
        self.servers: list[Node] = []

    def host(self, name: str) -> MemoryHost:
        return self.network.host(peer_of_key(name))

    async def start(self, node: Node) -> Node:
        for part in node.parts:
            await self.nursery.start(part)
        return node

    async def serve(self, count: int) -> None:
        """DHT servers, each of which begins with the first."""
        for number in range(len(self.servers), len(self.servers) + count):
            seeds = self.servers[0].host.addresses if self.servers else ()
            self.servers.append(await self.start(Node(self.host(f"server {number}"), seeds, serve=True)))

    @property
    def seeds(self) -> tuple[str, ...]:
        return self.servers[0].host.addresses


@asynccontextmanager
async def world(servers: int = 1) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        it = World(nursery)
        await it.serve(servers)
        if servers > 1 and isinstance(trio.lowlevel.current_clock(), MockClock):
            await trio.sleep(60)  # until they know each other
        yield it
        nursery.cancel_scope.cancel()


async def provided(node: Node, cid: Cid = CID) -> int:
    """Wait until a record was left; with how many."""
    while not node.routing.provided.get(cid):  # noqa: ASYNC110 - the service tells nobody
        await trio.sleep(1)
    return node.routing.provided[cid]


class Brought:
    """What a fetch is offered."""

    def __init__(self) -> None:
        self.peers: list[PeerId] = []
        self.came = trio.Event()

    async def offer(self, peer: PeerId) -> None:
        self.peers.append(peer)
        self.came.set()
        self.came = trio.Event()

    async def until(self, count: int) -> None:
        while len(self.peers) < count:
            await self.came.wait()


async def test_a_provider_is_found_among_many_servers(autojump_clock: MockClock) -> None:
    async with world(40) as it:
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID], anyone=True))
        assert await provided(provider) == K
        us = await it.start(Node(it.host("us"), it.servers[7].host.addresses))
        readers = us.host.roster.readers
        brought = Brought()
        async with trio.open_nursery() as fetch:
            fetch.start_soon(us.routing.bring, CID, brought.offer)
            with trio.fail_after(30):
                await brought.until(1)
            assert brought.peers == [PROVIDER]
            assert PROVIDER in us.host.guests
            fetch.cancel_scope.cancel()
        await trio.sleep(2 * LINGER_SECONDS)
        assert us.host.guests == () and provider.host.peers == (), "nobody stays longer than needed"
        assert us.host.roster.readers == readers
        assert us.routing.known_peers > K / 2


async def test_clients_answer_nothing_and_nobody(autojump_clock: MockClock) -> None:
    async with world(3) as it:
        us = await it.start(Node(it.host("us"), it.seeds))
        await trio.sleep(5)
        assert us.routing.known_peers == 3
        stranger = it.host("stranger")
        await it.nursery.start(stranger.run)
        await stranger.connect(US, us.host.addresses)
        for protocol in (LAN_PROTOCOL, BITSWAP):
            with pytest.raises(Declined):
                await stranger.open_stream(US, protocol)
        # Those that we ask may do as little.
        server = it.servers[0].host
        async with us.visits.visit(server.peer_id, server.addresses):
            for protocol in (LAN_PROTOCOL, BITSWAP):
                with pytest.raises(Declined):
                    await server.open_stream(US, protocol)


async def ask(host: MemoryHost, server: MemoryHost, data: bytes) -> list[Message]:
    """Everything that a server answers to these bytes."""
    await host.connect(server.peer_id, server.addresses)
    stream = await host.open_stream(server.peer_id, LAN_PROTOCOL)
    await stream.send_all(data)
    await stream.send_eof()
    reader, out = MessageReader(), []
    while data := await stream.receive_some():
        out += [decode(raw) for raw in reader.feed(data)]
    return out


async def test_a_server_keeps_records_of_the_sender_and_no_values(autojump_clock: MockClock) -> None:
    async with world() as it:
        server = it.servers[0]
        one = it.host("one")
        await it.nursery.start(one.run)
        ours = Peer(one.peer_id, ("/ip4/10.0.0.9/tcp/4331",))
        other = Peer(PROVIDER, ("/ip4/10.0.0.8/tcp/4331",))
        question = frame(Message(kind=Kind.GET_PROVIDERS, key=KEY))
        record = frame(Message(kind=Kind.ADD_PROVIDER, key=KEY, providers=(other, ours)))
        # Several questions may come over one stream.
        first, second = await ask(one, server.host, question + record + question)
        assert (first.providers, second.providers) == ((), (ours,))
        assert server.routing.records == 1
        with pytest.raises(PeerUnreachable):
            await ask(one, server.host, frame(Message(kind=Kind.PUT_VALUE, key=b"/pk/a")) + question)
        for garbage in (b"\xff" * 9, b"\x05hello", put_varint(MAX_REQUEST_BYTES + 1)):
            with pytest.raises(PeerUnreachable):
                await ask(one, server.host, garbage)
        assert await ask(one, server.host, frame(Message(kind=Kind.PING))) == [Message(kind=Kind.PING)]
        (us,) = await ask(one, server.host, frame(Message(kind=Kind.FIND_NODE, key=peer_bytes(server.host.peer_id))))
        assert [peer.id for peer in us.closer] == [server.host.peer_id]


async def test_records_are_renewed_and_end_with_their_provider(autojump_clock: MockClock) -> None:
    async with world() as it:
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID]))
        await provided(provider)
        one = it.host("one")
        await it.nursery.start(one.run)

        async def providers() -> list[PeerId]:
            (answer,) = await ask(one, it.servers[0].host, frame(Message(kind=Kind.GET_PROVIDERS, key=KEY)))
            await one.disconnect(it.servers[0].host.peer_id, "done")
            return [peer.id for peer in answer.providers]

        await trio.sleep(RECORD_SECONDS + PROVIDE_SECONDS)
        assert await providers() == [PROVIDER]
        provider.provides.clear()
        await trio.sleep(LOOK_SECONDS + 1)
        assert provider.routing.provided == {}
        await trio.sleep(RECORD_SECONDS - PROVIDE_SECONDS)
        assert await providers() == [PROVIDER], "others may rely on it as long as it said"
        await trio.sleep(PROVIDE_SECONDS)
        assert await providers() == []


async def test_what_is_new_is_provided_soon(autojump_clock: MockClock) -> None:
    async with world() as it:
        provider = await it.start(Node(it.host("provider"), it.seeds))
        await trio.sleep(100)
        provider.provides += [cid_of(RAW, str(number).encode()) for number in range(30)]
        await trio.sleep(2 * LOOK_SECONDS)
        assert list(provider.routing.provided.values()) == [1] * 30


async def test_an_unreachable_dht_stands_in_the_health_until_it_comes(autojump_clock: MockClock) -> None:
    async with world(0) as it:
        server = Node(it.host("server"), (), serve=True)
        us = await it.start(Node(it.host("us"), server.host.addresses, provides=[CID]))
        await trio.sleep(60)
        (shown,) = us.health.current()
        assert shown.code == "dht-unreachable" and shown.text.startswith("No DHT peer of the local network answers: ")
        assert server.host.peer_id in shown.text and "content.dht" in shown.text
        await it.start(server)
        await trio.sleep(70)
        assert us.health.current() == []
        assert await provided(us) == 1


async def test_without_an_address_there_nothing_is_provided(autojump_clock: MockClock) -> None:
    async with world(0) as it:
        open_seed = f"/ip4/8.8.8.8/tcp/4001/p2p/{PROVIDER}"
        us = await it.start(Node(it.host("us"), [open_seed], provides=[CID]))
        await trio.sleep(5)
        assert [shown.code for shown in us.health.current()] == ["dht-no-address"]
        assert "network.announce" in us.health.current()[0].text


Talk = Callable[[Stream], Awaitable[None]]


async def silent(stream: Stream) -> None:
    await trio.sleep_forever()


async def hang_up(stream: Stream) -> None:
    await stream.receive_some()


async def garbage(stream: Stream) -> None:
    await stream.receive_some()
    await stream.send_all(b"\x05hello")


async def endless(stream: Stream) -> None:
    await stream.send_all(put_varint(MAX_ANSWER_BYTES) + b"\x0a")
    while True:
        await stream.send_all(bytes(1000))
        await trio.sleep(0.5)


async def too_long(stream: Stream) -> None:
    await stream.send_all(put_varint(MAX_ANSWER_BYTES + 1))
    await trio.sleep_forever()


async def wrong_kind(stream: Stream) -> None:
    await stream.receive_some()
    await stream.send_all(frame(Message(kind=Kind.PING)))


@pytest.mark.parametrize("talk", [silent, hang_up, garbage, endless, too_long, wrong_kind])
async def test_a_bad_peer_holds_up_no_search(talk: Talk, autojump_clock: MockClock) -> None:
    async with world(4) as it:
        liar = it.host("liar")
        liar.handle(LAN_PROTOCOL, talk, open_to_strangers=True)
        await it.nursery.start(liar.run)
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID]))
        await provided(provider)
        us = await it.start(Node(it.host("us"), [*liar.addresses, *it.seeds]))
        brought = Brought()
        async with trio.open_nursery() as fetch:
            fetch.start_soon(us.routing.bring, CID, brought.offer)
            with trio.fail_after(2):
                await brought.until(1)
            fetch.cancel_scope.cancel()
        await trio.sleep(2 * ASK_SECONDS + LINGER_SECONDS)
        assert us.routing.known_peers == 4, "it is not relied on"
        assert us.health.current() == []


async def test_invented_providers_are_dialled_a_few_at_a_time(autojump_clock: MockClock) -> None:
    """Every one of 30 'providers' is somebody who listens and never gives anything."""
    async with world() as it:
        crowd = [it.host(f"crowd {number}") for number in range(30)]
        for host in crowd:
            await it.nursery.start(host.run)
        told = tuple(Peer(host.peer_id, (host.addresses[0].partition("/p2p/")[0],)) for host in crowd)

        async def lie(stream: Stream) -> None:
            await stream.receive_some()
            await stream.send_all(frame(Message(kind=Kind.GET_PROVIDERS, key=KEY, providers=told)))

        liar = it.host("liar")
        liar.handle(LAN_PROTOCOL, lie, open_to_strangers=True)
        await it.nursery.start(liar.run)
        us = await it.start(Node(it.host("us"), liar.addresses))
        brought = Brought()
        async with trio.open_nursery() as fetch:
            fetch.start_soon(us.routing.bring, CID, brought.offer)
            await trio.sleep(4 * SEARCH_PAUSE_SECONDS)
            assert len(brought.peers) == MAX_CARRIERS
            assert len(us.host.guests) <= MAX_CARRIERS + MAX_LINGERING
            # One leaves, another takes its place.
            it.network.kill(brought.peers[0])
            await trio.sleep(1)
            assert len(brought.peers) == MAX_CARRIERS + 1
            fetch.cancel_scope.cancel()
        await trio.sleep(2 * LINGER_SECONDS)
        assert set(us.host.guests) <= {liar.peer_id}


async def test_a_provider_without_addresses_is_looked_for(autojump_clock: MockClock) -> None:
    async with world(6) as it:
        told = (Peer(it.servers[5].host.peer_id),)

        async def forgetful(stream: Stream) -> None:
            question = decode(next(MessageReader().feed(await stream.receive_some())))
            closer = tuple(
                Peer(node.host.peer_id, (node.host.addresses[0].partition("/p2p/")[0],)) for node in it.servers[:2]
            )
            await stream.send_all(frame(Message(kind=question.kind, closer=closer, providers=told)))

        host = it.host("forgetful")
        host.handle(LAN_PROTOCOL, forgetful, open_to_strangers=True)
        await it.nursery.start(host.run)
        us = await it.start(Node(it.host("us"), host.addresses))
        brought = Brought()
        async with trio.open_nursery() as fetch:
            fetch.start_soon(us.routing.bring, CID, brought.offer)
            with trio.fail_after(30):
                await brought.until(1)
            assert brought.peers == [it.servers[5].host.peer_id]
            fetch.cancel_scope.cancel()


async def test_members_and_ourselves_are_not_brought(autojump_clock: MockClock) -> None:
    async with world(2) as it:
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID]))
        us = await it.start(Node(it.host("us"), it.seeds, provides=[CID], known=[PROVIDER]))
        await provided(provider)
        await provided(us)
        brought = Brought()
        with trio.move_on_after(3 * SEARCH_PAUSE_SECONDS):
            await us.routing.bring(CID, brought.offer)
        assert brought.peers == []


def test_a_seed_must_have_a_peer_id() -> None:
    host = MemoryNetwork().host(US)
    with pytest.raises(ConfigError, match=r"content\.dht"):
        RoutingService(
            host, Visits(host, bool, bool), bool, ["/ip4/10.1.1.1/tcp/1/p2p/" + "1" * 46], (), random.Random(1)
        )


# Visits


async def test_a_peer_is_a_guest_as_long_as_anybody_wants_it(autojump_clock: MockClock) -> None:
    async with world() as it:
        us = await it.start(Node(it.host("us"), ()))
        server = it.servers[0].host
        us.host.handle("/a", silent)
        us.host.handle("/b", silent)
        async with us.visits.visit(server.peer_id, server.addresses, ["/a"]):
            async with us.visits.visit(server.peer_id, server.addresses, ["/b"]):
                await (await server.open_stream(US, "/a")).aclose()
                await (await server.open_stream(US, "/b")).aclose()
            await (await server.open_stream(US, "/a")).aclose()
            with pytest.raises(Declined):
                await server.open_stream(US, "/b")
        lingering = us.host.guests
        assert lingering == (server.peer_id,), "it stays for the next question"
        with pytest.raises(Declined):
            await server.open_stream(US, "/a")
        await trio.sleep(2 * LINGER_SECONDS)
        left = us.host.guests
        assert left == ()
        gone = peer_of_key("nobody")
        with pytest.raises(PeerUnreachable):
            async with us.visits.visit(gone, ["/ip4/10.9.9.9/tcp/1"]):
                pytest.fail("there is nobody")
        await trio.testing.wait_all_tasks_blocked()
        assert us.host.roster.guests == {} and us.visits._grants == {}


async def test_who_is_wanted_again_at_its_dismissal_stays(autojump_clock: MockClock) -> None:
    async with world() as it:
        us = await it.start(Node(it.host("us"), ()))
        server = it.servers[0].host
        async with us.visits.visit(server.peer_id, server.addresses):
            pass
        us.visits._dismiss(server.peer_id)  # a task, which may run after a visit has begun
        us.visits._grant(server.peer_id, frozenset({"/a"}))
        await trio.testing.wait_all_tasks_blocked()
        assert us.host.guests == (server.peer_id,)


async def test_who_becomes_a_member_or_configured_guest_is_left_alone(autojump_clock: MockClock) -> None:
    async with world() as it:
        us = await it.start(Node(it.host("us"), ()))
        server = it.servers[0].host
        async with us.visits.visit(server.peer_id, server.addresses):
            us.known.add(server.peer_id)
            us.host.welcome(server.peer_id, ["/theirs"])
        await trio.sleep(2 * LINGER_SECONDS)
        assert us.host.guests == (server.peer_id,)
        assert us.host.roster.guests[server.peer_id] == {"/theirs"}


async def test_visitors_are_few_and_are_forgotten(autojump_clock: MockClock) -> None:
    async with world(0) as it:
        us = await it.start(Node(it.host("us"), (), anyone=True))
        us.host.handle(BITSWAP, silent, open_to_strangers=True)
        us.host.handle("/members/only", silent)
        strangers = [it.host(f"stranger {number}") for number in range(MAX_VISITORS + 2)]
        for host in strangers:
            await it.nursery.start(host.run)
            await host.connect(US, us.host.addresses)
            assert us.visits.take_in(host.peer_id)
            await trio.testing.wait_all_tasks_blocked()
        assert us.host.peers == () and len(us.host.guests) == MAX_VISITORS
        assert us.visits.visitors == tuple(host.peer_id for host in strangers[2:])
        late = strangers[-1]
        await (await late.open_stream(US, BITSWAP)).aclose()
        with pytest.raises(Declined):
            await late.open_stream(US, "/members/only")
        it.network.kill(late.peer_id)
        await trio.sleep(1)
        assert late.peer_id not in us.visits.visitors and late.peer_id not in us.host.roster.guests
        assert not us.visits.take_in(late.peer_id), "it is not connected"


async def test_strangers_are_not_taken_in_unless_something_is_for_them(autojump_clock: MockClock) -> None:
    async with world(0) as it:
        us = await it.start(Node(it.host("us"), ()))
        stranger = it.host("stranger")
        await it.nursery.start(stranger.run)
        await stranger.connect(US, us.host.addresses)
        assert not us.visits.take_in(stranger.peer_id)
        assert us.host.peers == (stranger.peer_id,)


async def test_a_peer_without_our_protocol_is_taken_in_and_another_network_is_not(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_mesh(tmp_path) as mesh:
        ann = await mesh.found("ann")
        visits = Visits(
            ann.host, lambda peer: bool(ann.membership.roles_of(peer)), lambda peer: False, [BITSWAP], entrance=HELLO
        )
        ann.membership._take_in = visits.take_in
        ann.host.handle(BITSWAP, silent, open_to_strangers=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(visits.run)
            stranger = mesh.network.host(peer_of_key("stranger"))
            await nursery.start(stranger.run)
            await stranger.connect(ann.peer_id, ann.host.addresses)
            # It is served at once, before and after it has been looked at.
            await (await stranger.open_stream(ann.peer_id, BITSWAP)).aclose()
            with trio.fail_after(5):
                events = ann.host.guest_events()
                while not visits.visitors:
                    await events.receive()
            await trio.sleep(120)
            assert ann.host.guests == (stranger.peer_id,) and ann.host.peers == ()
            assert ann.membership.refusals == () and ann.membership.members() == {}
            await (await stranger.open_stream(ann.peer_id, BITSWAP)).aclose()
            with pytest.raises(Declined):
                await stranger.open_stream(ann.peer_id, ECHO)
            # A node of another network speaks our protocol and is sent away; one with a ticket gets in.
            eve = await mesh.found("eve", network="elsewhere")
            await eve.connect(ann)
            await trio.sleep(20)
            assert eve.peer_id not in (*visits.visitors, *ann.host.peers)
            assert [refusal.peer for refusal in ann.membership.refusals] == [eve.peer_id]
            bob = await mesh.enter("bob", mesh.ticket(ann))
            await trio.sleep(1)
            await bob.meet(ann)
            assert await bob.call(ann) == b"hello"
            nursery.cancel_scope.cancel()


async def test_by_default_a_peer_without_our_protocol_is_sent_away(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_mesh(tmp_path) as mesh:
        ann = await mesh.found("ann")
        visits = Visits(ann.host, lambda peer: bool(ann.membership.roles_of(peer)), lambda peer: False)
        ann.membership._take_in = visits.take_in
        ann.host.handle(BITSWAP, silent)
        async with trio.open_nursery() as nursery:
            stranger = mesh.network.host(peer_of_key("stranger"))
            await nursery.start(stranger.run)
            await stranger.connect(ann.peer_id, ann.host.addresses)
            with pytest.raises(Declined):
                await stranger.open_stream(ann.peer_id, BITSWAP)
            await trio.sleep(30)
            assert ann.host.peers == ann.host.guests == ()
            assert [refusal.code for refusal in ann.membership.refusals] == ["stranger"]
            nursery.cancel_scope.cancel()


# With content


class Sharing(Node):
    """A node of the DHT that has files."""

    def __init__(self, host: MemoryHost, folder: Path, seeds: Sequence[str], *, anyone: bool = False) -> None:
        super().__init__(host, seeds, anyone=anyone)
        self.store = BlobStore(folder / host.peer_id, 1 << 40)
        self.content = ContentService(
            host,
            self.store,
            lambda _: (),
            patience=12,
            seek=self.routing.bring,
            sought=self.routing.sought,
            share_with_anyone=anyone,
        )

    @property
    def parts(self) -> tuple[Callable[..., Awaitable[None]], ...]:
        return *super().parts, self.content.run


async def test_a_file_is_fetched_from_a_node_of_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "LINGER_SECONDS", 1.0)
    data = noise(3 << 20)
    async with world(3) as it:
        provider = await it.start(Sharing(it.host("provider"), tmp_path, it.seeds, anyone=True))
        assert isinstance(provider, Sharing)
        (tmp_path / "file").write_bytes(data)
        cid = provider.store.add_file(tmp_path / "file", pin="test")
        provider.provides.append(cid)
        us = await it.start(Sharing(it.host("us"), tmp_path, it.seeds))
        assert isinstance(us, Sharing)
        with trio.fail_after(60):
            assert await provided(provider, cid) == 3
            path = await us.content.fetch(cid, len(data))
        assert path.read_bytes() == data
        assert us.content.fetched_from[PROVIDER] >= len(data)
        assert provider.content.served_to[US] >= len(data)
        # What we hold is not for those whom we fetched from.
        assert not us.content._may_have(PROVIDER) and provider.content._may_have(US)
        # The visitor leaves, and nothing about it is kept.
        with trio.fail_after(15):
            while PROVIDER in us.host.guests or provider.content.served_to[US]:  # noqa: ASYNC110 - nor this
                await trio.sleep(0.2)
        assert provider.content.bytes_served >= len(data)
        assert US not in provider.content._client._peers
        us.store.close()
        provider.store.close()


async def test_what_nobody_provides_is_not_found(tmp_path: Path) -> None:
    async with world(2) as it:
        us = await it.start(Sharing(it.host("us"), tmp_path, it.seeds))
        assert isinstance(us, Sharing)
        us.content._patience = 4
        with pytest.raises(ContentUnavailable, match="nobody gave"):
            await us.content.fetch_block(CID)
        us.store.close()


async def test_the_error_says_how_the_search_went(tmp_path: Path) -> None:
    async with world(2) as it:
        for name, seeds, words in (
            ("asking", it.seeds, "no provider is named in the DHT of "),
            ("alone", it.host("nowhere").addresses, "no DHT peer of "),
        ):
            us = await it.start(Sharing(it.host(name), tmp_path, seeds))
            assert isinstance(us, Sharing)
            us.content._patience = 5
            with pytest.raises(ContentUnavailable, match=words):
                await us.content.fetch_block(CID)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert us.routing.sought(CID).startswith("the search in the DHT of ")  # nothing is kept
            us.store.close()


async def test_the_search_begins_when_members_give_nothing(tmp_path: Path) -> None:
    data = noise(1 << 20)
    async with content_world(tmp_path) as it:
        sought: list[Cid] = []

        async def seek(cid: Cid, offer: Callable[[PeerId], Awaitable[None]]) -> None:
            sought.append(cid)
            await trio.sleep_forever()

        us = await it.start(US)
        member = await it.start(PROVIDER, data=data)
        us.content._seek = seek
        us.providers = (PROVIDER,)
        await us.host.connect(PROVIDER, member.host.addresses)
        for one, other in ((us, member), (member, us)):
            one.host.admit(other.host.peer_id, True)
        (cid,) = member.store.files()
        await us.content.fetch(cid, len(data))
        assert sought == [] and us.content._seeking == {}
        with pytest.raises(ContentUnavailable):
            await us.content.fetch_block(CID)
        assert sought == [CID] and us.content._seeking == {}
