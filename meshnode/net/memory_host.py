"""A network in memory behind the same port: delay, bandwidth, lost gossip, partitions, killed hosts.

Works in virtual time: nothing here reads a clock but trio's. Gossip floods over connected, admitted subscribers.
"""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio
from trio.lowlevel import ParkingLot

from meshnode.core.errors import PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.tasks import Tasks
from meshnode.net.peer_book import PeerBook
from meshnode.net.port import MAX_GOSSIP_BYTES, STALL_S, Handler, Lane, PeerEvent, Stream, Take
from meshnode.net.protocol_table import NOT_SERVED, STRANGER, ProtocolTable, refusal
from protocols.errors import LocalProtocolError
from protocols.ids import PeerId

DELAY_S: Final = 0.0002
WINDOW_BYTES: Final = 1 << 18  # what a reader may leave unread before its writer waits, as in Yamux
CONNECT_S: Final = 10.0
LAST_WORDS_S: Final = 0.05  # a peer that was told goodbye reads on for so long before it hears of the loss
SEEN_MESSAGES: Final = 4096

_log = get_logger("net")


@dataclass(slots=True)
class Link:
    """The wire between two hosts, one way."""

    delay: float = DELAY_S  # seconds
    bandwidth: float = 0.0  # bytes per second; 0 is without limit
    free_at: float = 0.0  # when the last byte that was handed over will have left

    def arrival(self, size: int) -> float:
        """When `size` bytes handed over now will have arrived."""
        if self.bandwidth:
            self.free_at = max(self.free_at, trio.current_time()) + size / self.bandwidth
            return self.free_at + self.delay
        return trio.current_time() + self.delay


class _Pipe:
    """One direction of a stream."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pieces: deque[tuple[float, bytes]] = deque()  # (arrival, bytes); b"" is the clean end
        self._unread = 0
        self._changed = ParkingLot()
        self.ended = ""  # why nothing more can be sent
        self._lost = ""  # why the bytes end without a clean end
        self.broken = ""  # why nothing more can be read, not even what has arrived

    def end(self, why: str, *, clean: bool) -> None:
        """Nothing is sent any more; what is under way still arrives, then the end or the loss."""
        if not self.ended:
            self._pieces.append((self._link.arrival(0), b""))
            self.ended = why
            self._lost = "" if clean else why
        self._changed.unpark_all()

    def reset(self, why: str) -> None:
        """Both ends fail at once."""
        self.broken = self.broken or why
        self.ended = self.ended or why
        self._changed.unpark_all()

    async def send(self, peer: PeerId, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        left = memoryview(data)
        while len(left) or self.ended:
            if self.broken or self.ended:
                raise PeerUnreachable(self.broken or self.ended, peer=peer)
            room = WINDOW_BYTES - self._unread
            if room > 0:
                self._pieces.append((self._link.arrival(len(left[:room])), bytes(left[:room])))
                self._unread += len(left[:room])
                left = left[room:]
                self._changed.unpark_all()
                continue
            with trio.move_on_after(STALL_S) as scope:
                await self._changed.park()
            if scope.cancelled_caught:
                self.reset(f"{peer} took no data for {STALL_S:.0f} s; the stream is broken")

    async def receive(self, peer: PeerId, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self.broken:
                raise PeerUnreachable(self.broken, peer=peer)
            if not self._pieces:
                await self._changed.park()
            elif (wait := self._pieces[0][0] - trio.current_time()) > 0:
                with trio.move_on_after(wait):  # woken earlier when the stream breaks
                    await self._changed.park()
            elif self._pieces[0][1]:
                return self._take(max_bytes)
            elif self._lost:
                raise PeerUnreachable(self._lost, peer=peer)
            else:
                return b""  # stays there: the end is the end

    def _take(self, max_bytes: int) -> bytes:
        arrival, data = self._pieces.popleft()
        if len(data) > max_bytes:
            self._pieces.appendleft((arrival, data[max_bytes:]))
            data = data[:max_bytes]
        self._unread -= len(data)
        self._changed.unpark_all()
        return data


class MemoryStream:
    """One end of a stream."""

    def __init__(self, peer: PeerId, connection: _Connection, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.peer = peer
        self._connection = connection
        self._incoming = incoming
        self._outgoing = outgoing

    async def send_all(self, data: bytes | memoryview) -> None:
        await self._outgoing.send(self.peer, data)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        return await self._incoming.receive(self.peer, max_bytes)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._outgoing.broken:
            raise PeerUnreachable(self._outgoing.broken, peer=self.peer)
        self._outgoing.end("this side of the stream is closed", clean=True)

    async def aclose(self) -> None:
        self._outgoing.end("this side of the stream is closed", clean=True)
        self._incoming.reset("the stream is closed")
        self._connection.streams.pop(self, None)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self._outgoing.reset("the stream was reset")
        self._incoming.reset("the stream was reset")
        self._connection.streams.pop(self, None)
        await trio.lowlevel.checkpoint()

    def lose(self) -> None:
        """The connection is gone: what was sent before arrives, nothing is sent any more."""
        self._outgoing.end(f"the connection to {self.peer} is gone", clean=False)


@dataclass(slots=True, eq=False)
class _Connection:
    one: MemoryHost
    other: MemoryHost
    streams: dict[MemoryStream, None] = field(default_factory=dict)  # in the order of their opening
    closed: bool = False  # by one end; the other one may not know yet
    gone: trio.Event = field(default_factory=trio.Event)  # at both ends

    def far_end(self, host: MemoryHost) -> MemoryHost:
        return self.other if host is self.one else self.one


class MemoryNetwork:
    """All hosts and the wires between them.

    Args:
      rng: decides which gossip is lost; a fixed seed when it is missing.
      delay: seconds one way, where `set_link` says nothing else.
    """

    def __init__(self, rng: random.Random | None = None, *, delay: float = DELAY_S) -> None:
        self.hosts: dict[PeerId, MemoryHost] = {}  # those that run
        self._rng = rng if rng is not None else random.Random(0)
        self._delay = delay
        self._links: dict[tuple[PeerId, PeerId], Link] = {}
        self._cut: set[frozenset[PeerId]] = set()
        self._gossip_loss = 0.0
        self._numbers: dict[PeerId, int] = {}

    def host(self, peer: PeerId) -> MemoryHost:
        """A new host with this id. The same id again is a restart of that node, at the same address."""
        number = self._numbers.setdefault(peer, len(self._numbers) + 1)
        address = f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4331/p2p/{peer}"
        return MemoryHost(self, peer, address)

    def set_link(self, one: PeerId, other: PeerId, *, delay: float = DELAY_S, bandwidth: float = 0.0) -> None:
        """Delay (seconds one way) and bandwidth (bytes per second, 0 = no limit) between two hosts, both ways."""
        for way in ((one, other), (other, one)):
            link = self.link(*way)
            link.delay, link.bandwidth = delay, bandwidth
            if way[0] in self.hosts:
                self.hosts[way[0]].book.links.notify()

    def set_gossip_loss(self, share: float) -> None:
        """The share (0 to 1) of gossiped copies that get lost, drawn for each hop."""
        self._gossip_loss = share

    def partition(self, one: Iterable[PeerId], other: Iterable[PeerId]) -> None:
        """Cut every pair of the two sides: connections break at once, new ones fail."""
        self._cut |= {frozenset(pair) for pair in itertools.product(one, other)}
        for host in list(self.hosts.values()):
            for peer in host.peers:
                if frozenset((host.peer_id, peer)) in self._cut:
                    self._break(host, peer, "the connection was lost")

    def heal(self) -> None:
        """End every partition. Nobody reconnects by that alone."""
        self._cut.clear()

    def kill(self, peer: PeerId) -> None:
        """What SIGKILL does: the host is gone, its peers see their connections lost. Its `run` returns."""
        host = self.hosts.get(peer)
        if host is not None:
            host.stop()

    def link(self, one: PeerId, other: PeerId) -> Link:
        """The wire from one host to another."""
        return self._links.setdefault((one, other), Link(delay=self._delay))

    def reaches(self, one: PeerId, other: PeerId) -> bool:
        """Whether packets between two hosts get through and the other one runs."""
        return other in self.hosts and frozenset((one, other)) not in self._cut

    def loses_gossip(self) -> bool:
        return self._rng.random() < self._gossip_loss

    def _break(self, host: MemoryHost, peer: PeerId, reason: str, *, linger: float = 0.0) -> None:
        """End a connection: here at once, at the far end after the wire's delay and `linger` seconds."""
        connection = host.connections.pop(peer, None)
        if connection is None:
            return
        for stream in list(connection.streams):
            stream.lose()
        connection.closed = True
        host.book.down(peer, reason)
        far = connection.far_end(host)
        if linger:
            far._tasks.start_soon(far._lose_later, connection, self.link(host.peer_id, peer).delay + linger)
        else:
            far._lose(connection)


class MemoryHost:
    """One node's place on a `MemoryNetwork`; see `port.Host` for what each method promises."""

    def __init__(self, network: MemoryNetwork, peer: PeerId, address: str) -> None:
        self._network = network
        self._peer = peer
        self._address = address
        self._table = ProtocolTable()
        self._topics: dict[str, Take] = {}
        self._seen: OrderedDict[tuple[PeerId, int], None] = OrderedDict()
        self._numbers = itertools.count(1)
        self._tasks = Tasks()
        self._alive = trio.CancelScope()
        self.book = PeerBook()
        self.connections: dict[PeerId, _Connection] = {}

    @property
    def peer_id(self) -> PeerId:
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self._address,)

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return self.book.connected

    @property
    def guests(self) -> tuple[PeerId, ...]:
        return self.book.connected_guests

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._network.kill(self._peer)  # a node that is started again takes the place of its former self
        self._network.hosts[self._peer] = self
        try:
            with self._alive:
                # Handlers run in here, so what they log is this node's, whoever has caused it.
                await self._tasks.run(task_status=task_status)
        finally:
            self._leave()

    def stop(self) -> None:
        """End `run` as if the process were killed."""
        self._leave()
        self._alive.cancel()

    def _leave(self) -> None:
        if self._network.hosts.get(self._peer) is self:
            del self._network.hosts[self._peer]
        for peer in list(self.connections):
            self._network._break(self, peer, "this host has stopped")

    def handle(self, protocol: str, handler: Handler, *, open_to_strangers: bool = False) -> None:
        self._table.add(protocol, handler, open_to_strangers=open_to_strangers)

    def admit(self, peer: PeerId, admitted: bool) -> None:
        if admitted:
            self.book.admitted.add(peer)
        else:
            self.book.admitted.discard(peer)
            self._network._break(self, peer, "its membership was withdrawn", linger=LAST_WORDS_S)

    def welcome(self, peer: PeerId, protocols: Sequence[str]) -> None:
        self.book.welcome(peer, protocols)

    async def dismiss(self, peer: PeerId, reason: str) -> None:
        if peer in self.book.guests:
            self._network._break(self, peer, reason, linger=LAST_WORDS_S)
            del self.book.guests[peer]
        await trio.lowlevel.checkpoint()

    def _serves(self, protocol: str, peer: PeerId) -> bool:
        if peer in self.book.guests:
            return protocol in self.book.guests[peer] and protocol in self._table
        return self._table.serves(protocol, peer, self.book.admitted)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        if peer == self._peer:
            raise PeerUnreachable("that is this very node", peer=peer)
        await trio.lowlevel.checkpoint()
        while (connection := self.connections.get(peer)) is not None:
            if not connection.closed:
                return
            await connection.gone.wait()
        if not self._network.reaches(self._peer, peer):
            await trio.sleep(self._network.link(self._peer, peer).delay)
            raise PeerUnreachable(f"{peer} does not answer at {', '.join(addresses) or 'no address'}", peer=peer)
        far = self._network.hosts[peer]
        if far._address not in addresses:
            raise PeerUnreachable(f"{peer} does not answer at {', '.join(addresses) or 'no address'}", peer=peer)
        with trio.move_on_after(CONNECT_S):
            await trio.sleep(2 * self._network.link(self._peer, peer).delay)
            if self._network.hosts.get(peer) is far and self._network.reaches(self._peer, peer):
                self._join(far)
                return
        raise PeerUnreachable(f"{peer} does not answer at {', '.join(addresses)}", peer=peer)

    def _lose(self, connection: _Connection) -> None:
        peer = connection.far_end(self).peer_id
        if self.connections.get(peer) is connection:
            del self.connections[peer]
            self.book.down(peer, "the connection was lost")
        connection.gone.set()

    async def _lose_later(self, connection: _Connection, seconds: float) -> None:
        await trio.sleep(seconds)
        self._lose(connection)

    def _join(self, far: MemoryHost) -> None:
        if far.peer_id in self.connections:
            return
        if self._peer in far.connections:
            far._lose(far.connections[self._peer])  # it has not noticed yet that we had left
        connection = _Connection(self, far)
        self.connections[far.peer_id] = connection
        far.connections[self._peer] = connection
        self.book.up(far.peer_id)
        far.book.up(self._peer)

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        await trio.lowlevel.checkpoint()
        self._network._break(self, peer, reason, linger=LAST_WORDS_S)

    async def open_stream(self, peer: PeerId, protocol: str, lane: Lane = Lane.CONTROL) -> Stream:
        await trio.lowlevel.checkpoint()
        connection = self.connections.get(peer)
        if connection is None:
            raise PeerUnreachable(f"{peer} is not connected", peer=peer)
        there, back = self._network.link(self._peer, peer), self._network.link(peer, self._peer)
        await trio.sleep(there.delay + back.delay)
        if self.connections.get(peer) is not connection:
            raise PeerUnreachable(f"{peer}: the connection is gone", peer=peer)
        far = connection.far_end(self)
        if not far._serves(protocol, self._peer):
            raise refusal(peer, protocol, NOT_SERVED if self._peer in far.book.admitted else STRANGER)
        out, into = _Pipe(there), _Pipe(back)
        ours = MemoryStream(peer, connection, into, out)
        theirs = MemoryStream(self._peer, connection, out, into)
        connection.streams |= {ours: None, theirs: None}
        far._tasks.start_soon(far._table.run, protocol, theirs)
        return ours

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > MAX_GOSSIP_BYTES:
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes; {MAX_GOSSIP_BYTES} is the limit")
        name = (self._peer, next(self._numbers))
        self._remember(name)
        self._pass_on(name, topic, data, source=self._peer)
        await trio.lowlevel.checkpoint()

    def subscribe(self, topic: str, take: Take) -> None:
        if topic in self._topics:
            raise LocalProtocolError(f"the topic {topic} has a subscriber already")
        self._topics[topic] = take

    def _pass_on(self, name: tuple[PeerId, int], topic: str, data: bytes, *, source: PeerId) -> None:
        for peer, connection in sorted(self.connections.items()):
            far = connection.far_end(self)
            admitted = peer in self.book.admitted and self._peer in far.book.admitted
            if peer != source and admitted and topic in far._topics and not self._network.loses_gossip():
                arrival = self._network.link(self._peer, peer).arrival(len(data))
                far._tasks.start_soon(far._hear, connection, name, topic, data, arrival)

    async def _hear(
        self, connection: _Connection, name: tuple[PeerId, int], topic: str, data: bytes, arrival: float
    ) -> None:
        await trio.sleep_until(arrival)
        forwarder = connection.far_end(self).peer_id
        if self.connections.get(forwarder) is not connection or name in self._seen:
            return
        self._remember(name)
        try:
            good = self._topics[topic](forwarder, data)
        except Exception:  # noqa: BLE001 - the border: a bug in a taker costs its message, not the process
            _log.exception("gossip.failed", topic=topic, peer=forwarder)
            return
        if good:
            self._pass_on(name, topic, data, source=forwarder)

    def _remember(self, name: tuple[PeerId, int]) -> None:
        self._seen[name] = None
        if len(self._seen) > SEEN_MESSAGES:
            self._seen.popitem(last=False)

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        return self.book.events()

    def guest_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        return self.book.guest_events()

    @property
    def links(self) -> Changes:
        return self.book.links

    def round_trip_us(self, peer: PeerId) -> int | None:
        if peer not in self.connections:
            return None
        there, back = self._network.link(self._peer, peer), self._network.link(peer, self._peer)
        return round((there.delay + back.delay) * 1_000_000)
