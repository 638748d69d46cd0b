"""What a client of the DHT needs around it, for tests: servers to ask, something to give, a network of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from meshnode.core.signal import Changes
from meshnode.net.libp2p.host import open_host
from meshnode.net.port import Host, Stream
from protocols.advert.messages import Holding
from protocols.ids import Cid, PeerId
from protocols.kad.address import peer_bytes
from protocols.kad.lookup import K
from protocols.kad.messages import LAN_PROTOCOL, Kind, Message, MessageReader, Peer, decode, frame, place, place_of

NEAR = 6  # of the others, those that one server knows besides every fifth: no walk ends after one question


@dataclass
class Town:
    """Servers that hear of each other, and all records that they took: (key, provider, when)."""

    servers: list[DhtPeer] = field(default_factory=list)
    records: list[tuple[bytes, PeerId, float]] = field(default_factory=list)


class DhtPeer:
    """Answers FIND_NODE and GET_PROVIDERS, keeps what ADD_PROVIDER says for ever."""

    def __init__(self, host: Host, town: Town) -> None:
        """Registers the protocol: make it before `host.run`."""
        self.host = host
        self._town = town
        self.providers: dict[bytes, dict[PeerId, Peer]] = {}
        town.servers.append(self)
        host.handle(LAN_PROTOCOL, self._serve, open_to_strangers=True)

    @property
    def peer(self) -> Peer:
        return Peer(self.host.peer_id, (self.host.addresses[0].partition("/p2p/")[0],))

    def known(self) -> list[Peer]:
        """Whom it can name: those near to it, and a few elsewhere."""
        ours = place_of(self.host.peer_id)
        others = [one for one in self._town.servers if one is not self and one.host.addresses]
        near = sorted(others, key=lambda one: place_of(one.host.peer_id) ^ ours)
        return [one.peer for one in {*near[: K + NEAR], *self._town.servers[::5]} if one is not self]

    async def _serve(self, stream: Stream) -> None:
        reader = MessageReader()
        while data := await stream.receive_some():
            for raw in reader.feed(data):
                answer = self._answer(stream.peer, decode(raw))
                if answer is not None:
                    await stream.send_all(frame(answer))

    def _answer(self, asker: PeerId, question: Message) -> Message | None:
        if question.kind is Kind.ADD_PROVIDER:
            for provider in question.providers:
                if provider.id == asker:
                    self.providers.setdefault(question.key, {})[asker] = provider
                    self._town.records.append((question.key, asker, trio.current_time()))
            return None
        target = place(question.key)
        closer = sorted(self.known(), key=lambda peer: place_of(peer.id) ^ target)[:K]
        if question.kind is Kind.FIND_NODE and question.key == peer_bytes(self.host.peer_id):
            closer = [self.peer]
        providers = tuple(self.providers.get(question.key, {}).values())
        return Message(kind=question.kind, key=question.key, closer=tuple(closer), providers=providers)


class Shared:
    """What a node gives to anybody."""

    def __init__(self, blocks: Sequence[Cid]) -> None:
        self.changes = Changes()
        self._blocks = tuple(blocks)

    def set(self, *blocks: Cid) -> None:
        self._blocks = blocks
        self.changes.notify()

    def holdings(self) -> tuple[Holding, ...]:
        """A manifest alone of every model."""
        return tuple(Holding(manifest=cid, cids=()) for cid in self._blocks)


class Network:
    """The members of a node's own network."""

    def __init__(self, members: Sequence[PeerId]) -> None:
        self._members = members

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        return frozenset({"node"} if peer in self._members else ())


@contextmanager
def dht_in_a_thread() -> Iterator[str]:
    """One server on a real libp2p host, while the test does something else; its multiaddr on loopback."""
    up = threading.Event()
    addresses: list[str] = []
    scopes: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def serve() -> None:
        host = open_host(bytes(range(32)))
        DhtPeer(host, Town())
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            addresses.extend(host.addresses)
            scopes.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            up.set()

    thread = threading.Thread(target=trio.run, args=(serve,), daemon=True)
    thread.start()
    assert up.wait(20), "the DHT server did not start"
    try:
        yield addresses[0]
    finally:
        token, scope = scopes[0]
        token.run_sync_soon(scope.cancel)
        thread.join(20)
