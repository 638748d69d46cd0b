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

from meshnode.bench.known import Known, content_of
from meshnode.core.errors import ConfigError, ContentUnavailable, Declined
from meshnode.core.health import Health
from meshnode.net.port import Stream
from meshnode.services import external_peers
from meshnode.services.dht.client import (
    ASK_S,
    MAX_PROVIDERS,
    PROVIDE_S,
    SEARCH_PAUSE_S,
    DhtClient,
    DhtSettings,
)
from meshnode.services.external_peers import LINGER_S, MAX_LINGERING, ExternalPeers, ExternalSettings
from meshnode.sim.network import MemoryHost, MemoryNetwork
from meshnode.store.blob_store import BlobStore
from protocols.bitswap.messages import PROTOCOL as BITSWAP
from protocols.ids import RAW, Cid, PeerId, cid_of, cid_to_bytes
from protocols.kad.lookup import K
from protocols.kad.messages import (
    LAN_PROTOCOL,
    MAX_MESSAGE_BYTES,
    Kind,
    Message,
    MessageReader,
    Peer,
    block_key,
    decode,
    frame,
)
from protocols.protobuf import put_varint
from tests.dht_peer import DhtPeer, Network, Shared, Town
from tests.refs import ref
from tests.services.test_external_peers import noise
from tests.services.test_external_peers import world as content_world
from tests.unit.membership_actors import peer_of_key

pytestmark = pytest.mark.slow  # waits in real time

US, PROVIDER = peer_of_key("us"), peer_of_key("provider")
CID = cid_of(RAW, b"a block")
KEY = block_key(cid_to_bytes(CID))


class Node:
    """A host with a client of the DHT."""

    def __init__(
        self,
        host: MemoryHost,
        seeds: Sequence[str],
        *,
        provides: Sequence[Cid] = (),
        anyone: bool = False,
        members: Sequence[PeerId] = (),
    ) -> None:
        self.host = host
        self.health = Health(trio.current_time)
        self.shared = Shared(provides)
        self.external = ExternalPeers(
            host, ExternalSettings(offers=(BITSWAP,) if anyone else ()), random.Random(1), health=self.health
        )
        self.dht = DhtClient(
            host,
            self.external,
            Network(members),
            DhtSettings(seeds=tuple(seeds), protocols=(BITSWAP,)),
            random.Random(1),
            shared=self.shared,
            health=self.health,
        )

    @property
    def parts(self) -> tuple[Callable[..., Awaitable[None]], ...]:
        return self.host.run, self.external.run, self.dht.run


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.nursery = nursery
        self.town = Town()

    def host(self, name: str) -> MemoryHost:
        return self.network.host(peer_of_key(name))

    async def start(self, node: Node) -> Node:
        for part in node.parts:
            await self.nursery.start(part)
        return node

    async def serve(self, count: int) -> None:
        for number in range(count):
            server = DhtPeer(self.host(f"server {number}"), self.town)
            await self.nursery.start(server.host.run)

    @property
    def servers(self) -> list[DhtPeer]:
        return self.town.servers

    @property
    def seeds(self) -> tuple[str, ...]:
        return self.servers[0].host.addresses


@asynccontextmanager
async def world(servers: int = 1) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        it = World(nursery)
        await it.serve(servers)
        yield it
        nursery.cancel_scope.cancel()


async def provided(node: Node, cid: Cid = CID) -> int:
    """Wait until a record was left; with how many."""
    while not (count := node.dht.provided.get(cid)):
        await node.dht.changes.wait()
    return count


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


@asynccontextmanager
async def looking(us: Node) -> AsyncIterator[Brought]:
    """While a fetch looks for who provides CID."""
    brought = Brought()
    async with trio.open_nursery() as fetch:
        fetch.start_soon(us.dht.find, CID, brought.offer)
        yield brought
        fetch.cancel_scope.cancel()


async def test_a_provider_is_found_among_many_servers(autojump_clock: MockClock) -> None:
    async with world(40) as it:
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID], anyone=True))
        assert await provided(provider) == K
        us = await it.start(Node(it.host("us"), it.servers[7].host.addresses))
        readers = us.host.book.readers
        async with looking(us) as brought:
            with trio.fail_after(30):
                await brought.until(1)
            assert brought.peers == [PROVIDER]
            assert PROVIDER in us.host.guests
        await trio.sleep(2 * LINGER_S)
        assert us.host.guests == () and provider.host.peers == (), "nobody stays longer than needed"
        assert us.host.book.readers == readers
        assert us.dht.known_peers > K / 2


async def test_clients_answer_nothing_and_nobody(autojump_clock: MockClock) -> None:
    async with world(3) as it:
        us = await it.start(Node(it.host("us"), it.seeds))
        await trio.sleep(5)
        assert us.dht.known_peers == 3
        stranger = it.host("stranger")
        await it.nursery.start(stranger.run)
        await stranger.connect(US, us.host.addresses)
        for protocol in (LAN_PROTOCOL, BITSWAP):
            with pytest.raises(Declined):
                await stranger.open_stream(US, protocol)
        # Those that we ask may do as little.
        server = it.servers[0].host
        async with us.external.use(server.peer_id, server.addresses):
            for protocol in (LAN_PROTOCOL, BITSWAP):
                with pytest.raises(Declined):
                    await server.open_stream(US, protocol)


async def test_records_are_renewed_while_there_is_something_to_provide(autojump_clock: MockClock) -> None:
    async with world() as it:
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID]))
        await provided(provider)
        await trio.sleep(PROVIDE_S)
        times = [when for key, peer, when in it.town.records if (key, peer) == (KEY, PROVIDER)]
        assert len(times) > 10, "a record that fewer peers took is left again so much sooner"
        provider.shared.set()
        await trio.testing.wait_all_tasks_blocked()
        assert provider.dht.provided == {}
        left = len(it.town.records)
        await trio.sleep(PROVIDE_S)
        assert len(it.town.records) == left


async def test_what_is_new_is_provided_soon(autojump_clock: MockClock) -> None:
    async with world() as it:
        provider = await it.start(Node(it.host("provider"), it.seeds))
        await trio.sleep(100)
        provider.shared.set(*(cid_of(RAW, str(number).encode()) for number in range(30)))
        await trio.sleep(1)
        assert list(provider.dht.provided.values()) == [1] * 30


async def test_an_unreachable_dht_stands_in_the_health_until_it_comes(autojump_clock: MockClock) -> None:
    async with world(0) as it:
        server = DhtPeer(it.host("server"), it.town)
        us = await it.start(Node(it.host("us"), server.host.addresses, provides=[CID]))
        await trio.sleep(60)
        (shown,) = us.health.current()
        assert shown.code == "dht-unreachable" and shown.text.startswith("No DHT peer of the local network answers: ")
        assert server.host.peer_id in shown.text and "content.dht" in shown.text
        await it.nursery.start(server.host.run)
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
    await stream.send_all(put_varint(MAX_MESSAGE_BYTES) + b"\x0a")
    while True:
        await stream.send_all(bytes(1000))
        await trio.sleep(0.5)


async def too_long(stream: Stream) -> None:
    await stream.send_all(put_varint(MAX_MESSAGE_BYTES + 1))
    await trio.sleep_forever()


async def wrong_kind(stream: Stream) -> None:
    await stream.receive_some()
    await stream.send_all(frame(Message(kind=Kind.PING)))


@pytest.mark.parametrize("talk", [silent, hang_up, garbage, endless, too_long, wrong_kind])
async def test_a_bad_peer_holds_up_no_search(talk: Talk, autojump_clock: MockClock) -> None:
    async with world(4) as it:
        hostile = it.host("hostile")
        hostile.handle(LAN_PROTOCOL, talk, open_to_strangers=True)
        await it.nursery.start(hostile.run)
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID]))
        await provided(provider)
        us = await it.start(Node(it.host("us"), [*hostile.addresses, *it.seeds]))
        async with looking(us) as brought:
            with trio.fail_after(2):
                await brought.until(1)
        await trio.sleep(2 * ASK_S + LINGER_S)
        assert us.dht.known_peers == 4, "it is not relied on"
        assert us.health.current() == []


async def test_invented_providers_are_dialled_a_few_at_a_time(autojump_clock: MockClock) -> None:
    """Every one of 30 'providers' is somebody who listens and never gives anything."""
    async with world() as it:
        crowd = [it.host(f"crowd {number}") for number in range(30)]
        for host in crowd:
            await it.nursery.start(host.run)
        told = tuple(Peer(host.peer_id, (host.addresses[0].partition("/p2p/")[0],)) for host in crowd)

        async def invent(stream: Stream) -> None:
            await stream.receive_some()
            await stream.send_all(frame(Message(kind=Kind.GET_PROVIDERS, key=KEY, providers=told)))

        hostile = it.host("hostile")
        hostile.handle(LAN_PROTOCOL, invent, open_to_strangers=True)
        await it.nursery.start(hostile.run)
        us = await it.start(Node(it.host("us"), hostile.addresses))
        async with looking(us) as brought:
            await trio.sleep(4 * SEARCH_PAUSE_S)
            assert len(brought.peers) == MAX_PROVIDERS
            assert len(us.host.guests) <= MAX_PROVIDERS + MAX_LINGERING
            # One leaves, another takes its place.
            it.network.kill(brought.peers[0])
            await trio.sleep(1)
            assert len(brought.peers) == MAX_PROVIDERS + 1
        await trio.sleep(2 * LINGER_S)
        assert set(us.host.guests) <= {hostile.peer_id}


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
        async with looking(us) as brought:
            with trio.fail_after(30):
                await brought.until(1)
            assert brought.peers == [it.servers[5].host.peer_id]


async def test_members_and_ourselves_are_not_brought(autojump_clock: MockClock) -> None:
    async with world(2) as it:
        provider = await it.start(Node(it.host("provider"), it.seeds, provides=[CID]))
        us = await it.start(Node(it.host("us"), it.seeds, provides=[CID], members=[PROVIDER]))
        await provided(provider)
        await provided(us)
        brought = Brought()
        with trio.move_on_after(3 * SEARCH_PAUSE_S):
            await us.dht.find(CID, brought.offer)
        assert brought.peers == []


def test_a_seed_must_have_a_peer_id() -> None:
    host = MemoryNetwork().host(US)
    with pytest.raises(ConfigError, match=r"content\.dht"):
        Node(host, ["/ip4/10.1.1.1/tcp/1/p2p/" + "1" * 46])


# With content


class Sharing(Node):
    """A node of the DHT that has files."""

    def __init__(
        self, host: MemoryHost, folder: Path, seeds: Sequence[str], *, anyone: bool = False, patience_s: float = 12
    ) -> None:
        super().__init__(host, seeds, anyone=anyone)
        self.store = BlobStore(folder / host.peer_id, 1 << 40)
        self.content = content_of(
            host,
            self.store,
            Known(host),
            share="anyone" if anyone else "members",
            patience_s=patience_s,
            finder=self.dht,
        )

    @property
    def parts(self) -> tuple[Callable[..., Awaitable[None]], ...]:
        return *super().parts, self.content.run


async def test_a_file_is_fetched_from_a_node_of_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_peers, "LINGER_S", 1.0)
    data = noise(3 << 20)
    async with world(3) as it:
        provider = await it.start(Sharing(it.host("provider"), tmp_path, it.seeds, anyone=True))
        assert isinstance(provider, Sharing)
        (tmp_path / "file").write_bytes(data)
        cid = provider.store.add_file(tmp_path / "file", pin="test")
        provider.shared.set(cid)
        us = await it.start(Sharing(it.host("us"), tmp_path, it.seeds))
        assert isinstance(us, Sharing)
        with trio.fail_after(60):
            assert await provided(provider, cid) == 3
            opened = await us.content.open(ref(cid, len(data)))
        assert opened.path.read_bytes() == data
        assert us.content.fetched_from[PROVIDER] >= len(data)
        assert provider.content.served_to[US] >= len(data)
        # What we hold is not for those whom we fetched from.
        assert not us.content.access.may_have(PROVIDER) and provider.content.access.may_have(US)
        # The visitor leaves, and nothing about it is kept.
        with trio.fail_after(15):
            while PROVIDER in us.host.guests or provider.content.served_to[US]:  # noqa: ASYNC110 - nor this
                await trio.sleep(0.2)
        assert provider.content.bytes_served >= len(data)
        assert US not in provider.content._exchange.client._peers
        us.store.close()
        provider.store.close()


async def test_what_nobody_provides_is_not_found(tmp_path: Path) -> None:
    async with world(2) as it:
        us = await it.start(Sharing(it.host("us"), tmp_path, it.seeds, patience_s=4))
        assert isinstance(us, Sharing)
        with pytest.raises(ContentUnavailable, match="nobody gave"):
            await us.content.block(CID)
        us.store.close()


async def test_the_error_says_how_the_search_went(tmp_path: Path) -> None:
    async with world(2) as it:
        for name, seeds, words in (
            ("asking", it.seeds, "no provider is named in the DHT of "),
            ("alone", it.host("nowhere").addresses, "no DHT peer of "),
        ):
            us = await it.start(Sharing(it.host(name), tmp_path, seeds, patience_s=5))
            assert isinstance(us, Sharing)
            with pytest.raises(ContentUnavailable, match=words):
                await us.content.block(CID)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert us.dht.so_far(CID).startswith("the search in the DHT of ")  # nothing is kept
            us.store.close()


class Seeking:
    """A search that finds nobody."""

    def __init__(self) -> None:
        self.sought: list[Cid] = []
        self.under_way = 0

    async def find(self, cid: Cid, offer: Callable[[PeerId], Awaitable[None]]) -> None:
        self.sought.append(cid)
        self.under_way += 1
        try:
            await trio.sleep_forever()
        finally:
            self.under_way -= 1

    def so_far(self, cid: Cid) -> str:
        return f"{self.under_way} are looking"


async def test_the_search_begins_when_members_give_nothing(tmp_path: Path) -> None:
    data = noise(1 << 20)
    async with content_world(tmp_path) as it:
        seeking = Seeking()
        us = await it.start(US, finder=seeking)
        member = await it.start(PROVIDER, data=data)
        us.providers.append(PROVIDER)
        await us.host.connect(PROVIDER, member.host.addresses)
        for one, other in ((us, member), (member, us)):
            one.host.admit(other.host.peer_id, True)
        (cid,) = member.store.files()
        await us.content.fetch(ref(cid, len(data)))
        assert seeking.sought == []
        with pytest.raises(ContentUnavailable, match="1 are looking"):
            await us.content.block(CID)
        assert seeking.sought == [CID] and seeking.under_way == 0
