"""A network in memory behind the same port: delay, bandwidth, lost gossip, partitions, dead links, killed hosts.

Works in virtual time: nothing here reads a clock but trio's. Gossip floods over connected, admitted subscribers.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import trio
from trio.lowlevel import ParkingLot

from meshnode.core.errors import PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.tasks import Tasks
from meshnode.net.inbox import Inbox
from meshnode.net.peer_book import PeerBook
from meshnode.net.port import MAX_GOSSIP_BYTES, STALL_S, Handler, Lane, PeerEvent, Stream, Take
from meshnode.net.protocol_table import NOT_SERVED, STRANGER, ProtocolTable, refusal
from protocols.errors import LocalProtocolError
from protocols.ids import PeerId

DELAY_S: Final = 0.0002
WINDOW_BYTES: Final = 1 << 18  # what a reader may leave unread before its writer waits, as in Yamux
CONNECT_S: Final = 10.0
SYN_S: Final = (1.0, 2.0, 4.0)  # pauses after which TCP knocks again while nobody answers
SILENCE_S: Final = 4.0  # after which a heartbeat gives a peer up, and up to a second later
LAST_WORDS_S: Final = 0.05  # a peer that was told goodbye reads on for so long before it hears of the loss
SEEN_MESSAGES: Final = 4096
PARTNERS: Final = 4  # with whom a host gossips by its own choice; others have chosen it
LAN_PACKETS: Final = 1024  # that wait for a reader

_log = get_logger("net")


@cache
def hash_of(one: PeerId, other: PeerId) -> bytes:
    """The same for a pair every time, and in no order that means anything."""
    return hashlib.sha256("".join(sorted((one, other))).encode()).digest()


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
        self.twins: dict[PeerId, MemoryHost] = {}  # that have the key of another one
        self._rng = rng if rng is not None else random.Random(0)
        self._delay = delay
        self._links: dict[tuple[PeerId, PeerId], Link] = {}
        self._cut: set[frozenset[PeerId]] = set()
        self._dead: set[frozenset[PeerId]] = set()  # pairs between which every packet gets lost
        self._gossip_loss = 0.0
        self._numbers: dict[PeerId, int] = {}
        self.lans: dict[MemoryLan, None] = {}  # that take part

    def host(self, peer: PeerId) -> MemoryHost:
        """A new host with this id. The same id again is a restart of that node, at the same address."""
        number = self._numbers.setdefault(peer, len(self._numbers) + 1)
        address = f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4331/p2p/{peer}"
        return MemoryHost(self, peer, address)

    def twin(self, peer: PeerId) -> MemoryHost:
        """A second host with the same id, elsewhere: somebody has copied a data folder."""
        return MemoryHost(self, peer, f"/ip4/10.255.{len(self.twins)}.1/tcp/4331/p2p/{peer}", twin=True)

    def listening(self, peer: PeerId, addresses: Iterable[str]) -> MemoryHost | None:
        """Who has this id and listens at one of these addresses."""
        found = (self.hosts.get(peer), self.twins.get(peer))
        return next((host for host in found if host is not None and host.addresses[0] in addresses), None)

    def local(self, peer: PeerId) -> MemoryLan:
        """A host's place on the one local network that all are on."""
        return MemoryLan(self, peer)

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

    def unplug(self, one: Iterable[PeerId], other: Iterable[PeerId]) -> None:
        """Packets between the two sides get lost, and nobody is told: connections end by the silence, dials wait.

        What streams carry until then still arrives.
        """
        pairs = {frozenset(pair) for pair in itertools.product(one, other) if len(set(pair)) == 2}
        self._dead |= pairs
        for pair in sorted(pairs, key=sorted):
            first, second = sorted(pair)
            host = self.hosts.get(first)
            if host is not None and second in host.connections:
                host._tasks.start_soon(self._give_up_later, host, host.connections[second])

    async def _give_up_later(self, host: MemoryHost, connection: _Connection) -> None:
        await trio.sleep(SILENCE_S + self._rng.random())
        peer = connection.far_end(host).peer_id
        if not self.reaches(host.peer_id, peer) and host.connections.get(peer) is connection:
            self._break(host, peer, f"no heartbeat for {SILENCE_S:.0f} s")

    def heal(self) -> None:
        """End every partition, plug every cable in. Nobody reconnects by that alone."""
        self._cut.clear()
        self._dead.clear()

    def move(self, peer: PeerId, address: str) -> None:
        """A host gets another address, and sees that it does. Its connections stay."""
        self.hosts[peer].move(address)

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
        pair = frozenset((one, other))
        runs = other in self.hosts or other in self.twins
        return runs and pair not in self._cut and pair not in self._dead

    async def knock(self, one: PeerId, other: PeerId) -> bool:
        """Whether one host gets an answer of another one; who gets none at all waits as long as a dial does."""
        pair = frozenset((one, other))
        for pause in SYN_S:
            if pair not in self._dead:
                break
            await trio.sleep(pause)
        if pair in self._dead:
            await trio.sleep(CONNECT_S - sum(SYN_S))
            return False
        if not self.reaches(one, other):
            await trio.sleep(self.link(one, other).delay)
            return False
        return True

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

    def __init__(self, network: MemoryNetwork, peer: PeerId, address: str, *, twin: bool = False) -> None:
        self._network = network
        self._peer = peer
        self._address = address
        self._table = ProtocolTable()
        self._topics: dict[str, Take] = {}
        self._seen: OrderedDict[tuple[PeerId, int], None] = OrderedDict()
        self._twin = twin
        self._numbers = itertools.count(1 << 32 if twin else 1)
        self._tasks = Tasks()
        self._alive = trio.CancelScope()
        self._surroundings = Changes()
        self._gossips_among: set[PeerId] = set()
        self._gossips_with: frozenset[PeerId] = frozenset()
        self.sent = 0  # gossiped copies
        self.opened = 0  # streams
        self.book = PeerBook()
        self.connections: dict[PeerId, _Connection] = {}
        self._further: dict[PeerId, list[_Connection]] = {}  # of a peer's twin

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
        if self._twin:
            self._network.twins[self._peer] = self
        else:
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
        for running in (self._network.hosts, self._network.twins):
            if running.get(self._peer) is self:
                del running[self._peer]
        for peer in list(self.connections):
            self._network._break(self, peer, "this host has stopped")

    def handle(
        self,
        protocol: str,
        handler: Handler,
        *,
        open_to_strangers: bool | Callable[[], bool] = False,
        bounded: bool = True,
    ) -> None:
        self._table.add(protocol, handler, open_to_strangers=open_to_strangers, bounded=bounded)

    def on_flood(self, listener: Callable[[PeerId, str], None]) -> None:
        self._table.on_flood = listener

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
        if not await self._network.knock(self._peer, peer):
            raise PeerUnreachable(f"{peer} does not answer at {', '.join(addresses) or 'no address'}", peer=peer)
        far = self._network.listening(peer, addresses)
        if far is None:
            raise PeerUnreachable(f"{peer} does not answer at {', '.join(addresses) or 'no address'}", peer=peer)
        with trio.move_on_after(CONNECT_S):
            await trio.sleep(2 * self._network.link(self._peer, peer).delay)
            if self._network.listening(peer, addresses) is far and self._network.reaches(self._peer, peer):
                self._join(far)
                return
        raise PeerUnreachable(f"{peer} does not answer at {', '.join(addresses)}", peer=peer)

    def _lose(self, connection: _Connection) -> None:
        peer = connection.far_end(self).peer_id
        further = self._further.get(peer, [])
        if connection in further:
            further.remove(connection)
        elif self.connections.get(peer) is connection:
            if further:
                self.connections[peer] = further.pop(0)  # the peer is still there, for all that we know
            else:
                del self.connections[peer]
                self.book.down(peer, "the connection was lost")
        connection.gone.set()

    async def _lose_later(self, connection: _Connection, seconds: float) -> None:
        await trio.sleep(seconds)
        self._lose(connection)

    def _join(self, far: MemoryHost) -> None:
        if far.peer_id in self.connections:
            return
        connection = _Connection(self, far)
        self.connections[far.peer_id] = connection
        known = far.connections.get(self._peer)
        if known is not None and not known.closed and known.far_end(far)._runs_beside(self):
            far._further.setdefault(self._peer, []).append(connection)  # our twin was here first
        else:
            if known is not None:
                far._lose(known)  # it has not noticed yet that we had left
            far.connections[self._peer] = connection
        self.book.up(far.peer_id)
        far.book.up(self._peer)

    def _runs_beside(self, other: MemoryHost) -> bool:
        """Whether this is the twin of another host, and neither its former self nor itself."""
        running = (self._network.hosts.get(self._peer), self._network.twins.get(self._peer))
        return self is not other and self in running

    def doubt(self, peer: PeerId) -> None:
        """A silence ends every connection here after the same time, whoever doubts."""

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
        self.opened += 1
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
        chosen = self._partners()
        for peer, connection in sorted(self.connections.items()):
            far = connection.far_end(self)
            admitted = peer in self.book.admitted and self._peer in far.book.admitted
            partners = peer in chosen or self._peer in far._partners()
            if peer == source or not (admitted and partners and topic in far._topics):
                continue
            self.sent += 1
            if not self._network.loses_gossip():
                arrival = self._network.link(self._peer, peer).arrival(len(data))
                far._tasks.start_soon(far._hear, connection, name, topic, data, arrival)

    def _partners(self) -> frozenset[PeerId]:
        """The peers that this host has chosen to gossip with, as GossipSub chooses some at random."""
        peers = self.connections.keys() & self.book.admitted
        if peers != self._gossips_among:
            self._gossips_among = set(peers)
            ranked = sorted(peers, key=lambda peer: hash_of(self._peer, peer))
            self._gossips_with = frozenset(ranked[:PARTNERS])
        return self._gossips_with

    async def _hear(
        self, connection: _Connection, name: tuple[PeerId, int], topic: str, data: bytes, arrival: float
    ) -> None:
        await trio.sleep_until(arrival)
        forwarder = connection.far_end(self).peer_id
        if not self._has(connection) or name in self._seen:
            return
        if not self._network.reaches(forwarder, self._peer):
            return
        self._remember(name)
        try:
            good = self._topics[topic](forwarder, data)
        except Exception:  # noqa: BLE001 - the border: a bug in a taker costs its message, not the process
            _log.exception("gossip.failed", topic=topic, peer=forwarder)
            return
        if good:
            self._pass_on(name, topic, data, source=forwarder)

    def _has(self, connection: _Connection) -> bool:
        peer = connection.far_end(self).peer_id
        return self.connections.get(peer) is connection or connection in self._further.get(peer, ())

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

    @property
    def surroundings(self) -> Changes:
        return self._surroundings

    def move(self, address: str) -> None:
        """From now on it listens at another address, and knows it; its connections stay."""
        self._address = address
        self._surroundings.notify()

    def round_trip_us(self, peer: PeerId) -> int | None:
        if peer not in self.connections:
            return None
        there, back = self._network.link(self._peer, peer), self._network.link(peer, self._peer)
        return round((there.delay + back.delay) * 1_000_000)


class MemoryLan:
    """`port.LocalNetwork`: whatever one host sends reaches all that it can reach, itself too."""

    def __init__(self, network: MemoryNetwork, peer: PeerId) -> None:
        self._network = network
        self._peer = peer
        self._inbox = Inbox[tuple[float, bytes]](LAN_PACKETS)
        self.sent: list[bytes] = []

    async def renew(self) -> None:
        self._network.lans[self] = None
        await trio.lowlevel.checkpoint()

    async def send(self, data: bytes) -> None:
        self.sent.append(data)
        for lan in self._network.lans:
            if lan._peer == self._peer or self._network.reaches(self._peer, lan._peer):
                lan._inbox.put((trio.current_time() + DELAY_S, data))
        await trio.lowlevel.checkpoint()

    async def receive(self) -> bytes:
        arrival, data = await self._inbox.receive.receive()
        await trio.sleep_until(arrival)
        return data

    def close(self) -> None:
        self._network.lans.pop(self, None)
