"""A node's place on the real network: TCP, Noise and Yamux by py-libp2p, with its guards; gossip by GossipSub.

Who may do what: before `admit`, a peer can agree on identify, ping and protocols that are open to strangers, and
on nothing else; it gets no gossip and brings none. A guest stays like that, with the protocols it was granted.
Handlers run in our nursery, the library only waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.tasks import Tasks
from meshnode.net import heartbeat
from meshnode.net.addresses import reachable_hosts
from meshnode.net.connection_limits import (
    GUEST_STREAMS,
    MAX_STRANGERS,
    MEMBER_STREAM_FRAMES,
    MEMBER_STREAMS,
    STRANGER_S,
    STRANGER_STREAMS,
    Allowances,
)
from meshnode.net.heartbeat import Heartbeat
from meshnode.net.lane.lane import DirectLanes, Ends
from meshnode.net.libp2p.dialler import Dialler
from meshnode.net.libp2p.listener import Listener
from meshnode.net.libp2p.multistream import ADMITTED, agree, propose
from meshnode.net.libp2p.replacements import IDENTIFY, PING, ConnectionWatcher, GuardedMuxer, Libp2pStack
from meshnode.net.libp2p.yamux import YamuxStream
from meshnode.net.peer_book import PeerBook
from meshnode.net.port import MAX_GOSSIP_BYTES, Handler, Lane, PeerEvent, Stream, Take
from meshnode.net.protocol_table import NOT_SERVED, STRANGER, ProtocolTable, refusal
from meshnode.net.surroundings import watch_surroundings
from meshnode.net.vigil import ALERT_S, Vigil
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId
from protocols.multiaddr import address_of, owned

OPEN_S: Final = 10.0
AGREE_S: Final = 10.0
FAREWELL_S: Final = 1.5
LAST_WORDS_S: Final = 0.05  # readers finish what had arrived before they hear that the peer is gone

_log = get_logger("net")


class Libp2pHost(ConnectionWatcher):
    """The `Host` of `port.py`.

    Args:
      seed: the 32 bytes of the Ed25519 node key; the peer id follows from it.
      listen: multiaddrs like /ip4/0.0.0.0/tcp/4331; port 0 takes any free one.
      announce: multiaddrs that others are told instead of those we find on this machine.
      swarm_key: the 32 bytes that every libp2p connection of a private IPFS network goes under; empty: none.

    Raises:
      ConfigError: an address that can't be used for listening.
    """

    def __init__(
        self,
        seed: bytes,
        listen: Sequence[str],
        *,
        announce: Sequence[str] = (),
        swarm_key: bytes = b"",
    ) -> None:
        self._announce = tuple(announce)
        self._table = ProtocolTable()
        self._table.add(heartbeat.PROTOCOL, heartbeat.Answers().answer)
        self._book = PeerBook()
        self._topics: dict[str, Take] = {}
        self._connections: dict[PeerId, list[GuardedMuxer]] = {}
        self._allowances = Allowances()
        self._heartbeats: dict[PeerId, tuple[Heartbeat, trio.CancelScope]] = {}
        self._addresses: tuple[str, ...] = ()
        self._surroundings = Changes()
        self._machine = _addresses_of_machine()
        self._tasks = Tasks()
        self._stack = Libp2pStack(
            seed,
            self,
            lambda: self._addresses,
            self.open_agreed,
            self._offers,
            self._book.admitted.__contains__,
            swarm_key,
        )
        self._stack.pubsub.flooded = lambda peer: self._table.on_flood(peer, "gossip")
        self._vigil = Vigil(self.peer_id)
        self._lanes = DirectLanes(self._table, self._book, self)
        self._listener = Listener(listen, self._take_libp2p, self._lanes)
        self._dialler = Dialler(self._stack.swarm, self, self._listener.is_ours, keyed=bool(swarm_key))
        self._stack.host.serve = self._serve

    @property
    def peer_id(self) -> PeerId:
        return self._stack.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return self._book.connected

    @property
    def guests(self) -> tuple[PeerId, ...]:
        return self._book.connected_guests

    # Running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._listener.open()
        self._look_for_addresses()
        scope = trio.CancelScope(shield=True)  # lives on for the farewell when we are cancelled
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._run_shielded, scope)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + FAREWELL_S):
                        await self._say_farewell()
                    scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._listener.aclose()

    def _look_for_addresses(self) -> None:
        found = tuple(
            str(address_of(ip, port, self.peer_id))
            for host, port in self._listener.bound
            for ip in reachable_hosts(host)
        )
        self._addresses = tuple(owned(text, self.peer_id) for text in self._announce) or found

    def _changed_around(self, what: str) -> None:
        """Addresses or links of this machine changed, or it slept. Connections of addresses that it has no more
        are over, which nothing but a long silence would tell."""
        _log.info("network.changed", what=what)
        self._look_for_addresses()
        before, self._machine = self._machine, _addresses_of_machine()
        for connections in list(self._connections.values()):
            for connection in connections:
                ip = connection.local[0]
                if ip in before - self._machine:
                    self._tasks.start_soon(connection.session.kill, f"this machine has no address {ip} any more")
        self._surroundings.notify()

    async def _run_shielded(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with self._stack.running(), trio.open_nursery() as nursery:
                await nursery.start(self._tasks.run)
                await nursery.start(self._lanes.run)
                for topic, take in self._topics.items():
                    await self._stack.subscribe(topic, take)
                nursery.start_soon(self._listener.run)
                nursery.start_soon(watch_surroundings, self._changed_around)
                task_status.started()
                await trio.sleep_forever()

    async def _say_farewell(self) -> None:
        """What was published goes out, then every peer hears that we go."""
        await self._stack.flush_gossip()
        async with trio.open_nursery() as nursery:
            for connections in list(self._connections.values()):
                for connection in connections:
                    nursery.start_soon(connection.session.close, "this host has stopped")

    async def _take_libp2p(self, stream: trio.SocketStream, first: bytes) -> None:
        await self._stack.swarm.take_socket(stream, None, first)

    # Connections

    def connection_up(self, connection: GuardedMuxer) -> None:
        """A connection has authenticated its peer. Called by the library's side."""
        peer = connection.peer
        connection.session.allowance = self._allowances.of(peer)
        connection.session.on_slowed = lambda: self._table.on_flood(peer, "frames or streams")
        if peer in self._book.admitted:
            connection.session.stream_frames = MEMBER_STREAM_FRAMES
        else:
            connection.session.max_streams = GUEST_STREAMS if peer in self._book.guests else STRANGER_STREAMS
        self._connections.setdefault(peer, []).append(connection)
        self._book.up(peer)
        if peer not in self._book.guests:
            self._tasks.start_soon(self._limit_stranger, connection)
        self._start_heartbeat(peer)

    def connection_over(self, connection: GuardedMuxer) -> None:
        """A connection has ended. Its peer is gone when it was the last one, after a moment for last words."""
        if connection in self._connections.get(connection.peer, ()):
            self._tasks.start_soon(self._forget_later, connection)

    async def _forget_later(self, connection: GuardedMuxer) -> None:
        await trio.sleep(LAST_WORDS_S)
        self._forget(connection)

    def _forget(self, connection: GuardedMuxer) -> None:
        peer = connection.peer
        if connection not in self._connections.get(peer, ()):
            return
        left = [other for other in self._connections[peer] if other is not connection]
        if left:
            self._connections[peer] = left
            return
        del self._connections[peer]
        _, scope = self._heartbeats.pop(peer, (None, None))
        if scope is not None:
            scope.cancel()
        self._share_watch()
        self._lanes.break_off(peer, connection.session.ended)
        _log.debug("connection.over", peer=peer, reason=connection.session.ended)
        self._book.down(peer, connection.session.ended)

    async def _limit_stranger(self, connection: GuardedMuxer) -> None:
        strangers = [
            other
            for peer, connections in self._connections.items()
            for other in connections
            if peer not in self._book.admitted
            and peer not in self._book.guests
            and not other.initiator
            and not other.session.ended
        ]
        if len(strangers) > MAX_STRANGERS:
            await strangers[0].session.kill("newer peers that are no members either took its place")
        with trio.move_on_after(STRANGER_S):
            await connection.session.over.wait()
            return
        if connection.peer not in self._book.admitted and connection.peer not in self._book.guests:
            await connection.session.close(f"it did not become a member within {STRANGER_S:.0f} s")

    def live(self, peer: PeerId) -> GuardedMuxer | None:
        """The oldest connection to a peer that has not ended."""
        return next((c for c in self._connections.get(peer, ()) if not c.session.ended), None)

    async def wait_ended(self, peer: PeerId) -> None:
        """Until a peer has a connection that is up, or none at all, not even one that is ending."""
        while self._connections.get(peer) and self.live(peer) is None:  # noqa: ASYNC110 - once, as a rule
            await trio.sleep(LAST_WORDS_S)  # what `_forget_later` waits, too

    def ends_of(self, peer: PeerId) -> Ends | None:
        """Of the connection to a peer; None when there is none."""
        connection = self.live(peer)
        if connection is None:
            return None
        return Ends(connection.local, (connection.remote.host, connection.remote.port), connection.initiator)

    def port_of(self, host: str) -> int:
        """Where this host listens at an address of this machine; 0: nowhere."""
        ports = dict(reversed(self._listener.bound))  # the first one of each address
        return ports.get(host) or ports.get("::" if ":" in host else "0.0.0.0") or 0

    def admit(self, peer: PeerId, admitted: bool) -> None:
        if not admitted:
            self._book.admitted.discard(peer)
            self._tasks.start_soon(self.disconnect, peer, "its membership was withdrawn")
            return
        self._book.admitted.add(peer)
        for connection in self._connections.get(peer, ()):
            connection.session.max_streams = MEMBER_STREAMS
            connection.session.stream_frames = MEMBER_STREAM_FRAMES
        self._start_heartbeat(peer)

    def welcome(self, peer: PeerId, protocols: Sequence[str]) -> None:
        self._book.welcome(peer, protocols)
        for connection in self._connections.get(peer, ()):
            connection.session.max_streams = GUEST_STREAMS
        self._start_heartbeat(peer)

    async def dismiss(self, peer: PeerId, reason: str) -> None:
        if peer in self._book.guests:
            connections = self._cut(peer, reason)
            del self._book.guests[peer]
            await _close_all(connections, reason)

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        await _close_all(self._cut(peer, reason), reason)

    def _cut(self, peer: PeerId, reason: str) -> list[GuardedMuxer]:
        """End the connections to a peer for everybody here; they are still to be closed."""
        connections = list(self._connections.get(peer, ()))
        for connection in connections:
            connection.session.end(reason)
        for connection in connections:
            self._forget(connection)
        return connections

    # Dialling

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        if peer == self.peer_id:
            raise PeerUnreachable("that is this very node", peer=peer)
        await self._dialler.connect(peer, addresses)

    # Streams

    async def open_stream(self, peer: PeerId, protocol: str, lane: Lane = Lane.CONTROL) -> Stream:
        if lane is not Lane.CONTROL and peer in self._book.admitted:
            direct_stream = await self._lanes.open(peer, protocol)
            if direct_stream is not None:
                return direct_stream
        return await self.open_agreed(peer, (protocol,))

    async def open_agreed(self, peer: PeerId, protocols: tuple[str, ...]) -> YamuxStream:
        """A libp2p stream of one of these protocols. Raises PeerUnreachable, Declined."""
        connection = self.live(peer)
        if connection is None:
            raise PeerUnreachable(f"{peer} is not connected", peer=peer)
        stream = connection.session.open()
        agreed = None
        try:
            with trio.move_on_after(OPEN_S):
                agreed = await propose(stream, (*protocols, ADMITTED))
        except RemoteProtocolError as error:
            raise PeerUnreachable(str(error), peer=peer) from error
        finally:
            if agreed not in protocols:
                stream.reset_nowait()
        if agreed is None:
            raise PeerUnreachable(f"{peer} did not answer to {protocols[0]} within {OPEN_S:.0f} s", peer=peer)
        if agreed not in protocols:
            raise refusal(peer, protocols[0], NOT_SERVED if agreed == ADMITTED else STRANGER)
        return stream

    async def _serve(self, net_stream: Any, stream: YamuxStream) -> None:
        """A stream that a peer opened; the library waits for its end."""
        protocol = None
        try:
            with trio.move_on_after(AGREE_S):
                protocol = await agree(stream, lambda name: self._serves(name, stream.peer))
        except (PeerUnreachable, RemoteProtocolError) as error:
            _log.debug("stream.unagreed", peer=stream.peer, reason=str(error))
        if protocol == ADMITTED:
            await stream.aclose()  # that was the whole conversation
        elif not protocol:
            stream.reset_nowait()
        elif self._stack.serves(protocol):
            if protocol not in (IDENTIFY, PING):
                self._stack.pubsub.greet(stream.peer)  # it gossips with us, so it admits us
            await self._stack.handle(protocol, net_stream, stream)
        else:
            over = trio.Event()
            self._tasks.start_soon(self._run_handler, protocol, stream, over)
            await over.wait()

    def _serves(self, protocol: str, peer: PeerId) -> bool:
        if protocol == ADMITTED:
            return peer in self._book.admitted
        if peer in self._book.guests:
            return protocol in (IDENTIFY, PING) or (protocol in self._book.guests[peer] and protocol in self._table)
        if self._stack.serves(protocol):
            return protocol in (IDENTIFY, PING) or peer in self._book.admitted
        return self._table.serves(protocol, peer, self._book.admitted)

    def _offers(self, peer: PeerId) -> list[str]:
        """Every protocol that this peer may use now."""
        return sorted(name for name in {*self._stack.protocols, *self._table.all} if self._serves(name, peer))

    async def _run_handler(self, protocol: str, stream: YamuxStream, over: trio.Event) -> None:
        try:
            await self._table.run(protocol, stream)
        finally:
            over.set()

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

    # Heartbeat

    def _start_heartbeat(self, peer: PeerId) -> None:
        if peer in self._heartbeats or peer not in self._book:
            return
        if peer in self._book.guests:
            beat = Heartbeat(_Guest(self, peer), heartbeat.GUEST)
        elif peer in self._book.admitted:
            beat = Heartbeat(_Member(self, peer))
            self.greet(peer)
        else:
            return
        scope = trio.CancelScope()
        self._heartbeats[peer] = (beat, scope)
        self._tasks.start_soon(self._watch, peer, beat, scope)
        self._share_watch()

    def _share_watch(self) -> None:
        """Watch those closely whom we have to, and the others calmly."""
        members = [peer for peer in self._heartbeats if peer not in self._book.guests]
        close = self._vigil.close(members, trio.current_time())
        for peer in members:
            self._heartbeats[peer][0].follow(heartbeat.MEMBER if peer in close else heartbeat.CALM)

    async def _share_watch_later(self) -> None:
        await trio.sleep(ALERT_S)
        self._share_watch()

    def greet(self, peer: PeerId) -> None:
        """Gossip with a member that may admit us."""
        self._stack.pubsub.greet(peer)

    def doubt(self, peer: PeerId) -> None:
        if peer in self._heartbeats:
            self._vigil.doubt(peer, trio.current_time())
            self._share_watch()
            self._tasks.start_soon(self._share_watch_later)

    def heard_at(self, peer: PeerId) -> float:
        """When the last bytes came from a peer (`trio.current_time`)."""
        return max((c.session.heard_at for c in self._connections.get(peer, ())), default=0.0)

    async def _watch(self, peer: PeerId, beat: Heartbeat, scope: trio.CancelScope) -> None:
        with scope:
            await beat.watch()
        if not scope.cancelled_caught:
            self._vigil.alert(trio.current_time())  # it may be our own link that is dead
            self._share_watch()
            self._tasks.start_soon(self._share_watch_later)
            for connection in list(self._connections.get(peer, ())):
                await connection.session.kill(beat.lost)

    @property
    def links(self) -> Changes:
        return self._book.links

    @property
    def surroundings(self) -> Changes:
        return self._surroundings

    def round_trip_us(self, peer: PeerId) -> int | None:
        beat, _ = self._heartbeats.get(peer, (None, None))
        return beat.round_trip_us if beat is not None else None

    # Gossip

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > MAX_GOSSIP_BYTES:
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes; {MAX_GOSSIP_BYTES} is the limit")
        await self._stack.pubsub.publish(topic, data)

    def subscribe(self, topic: str, take: Take) -> None:
        if topic in self._topics:
            raise LocalProtocolError(f"the topic {topic} has a subscriber already")
        self._topics[topic] = take

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        return self._book.events()

    def guest_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        return self._book.guest_events()


class _Member:
    """A member under watch."""

    def __init__(self, host: Libp2pHost, peer: PeerId) -> None:
        self._host = host
        self._peer = peer

    async def open_stream(self) -> Stream:
        return await self._host.open_agreed(self._peer, (heartbeat.PROTOCOL,))

    def heard_at(self) -> float:
        return self._host.heard_at(self._peer)

    def agreed(self) -> None:
        self._host.greet(self._peer)

    def moved(self) -> None:
        self._host.links.notify()


class _Guest(_Member):
    """A guest under watch: libp2p's ping comes back, too, and nobody gossips with it."""

    async def open_stream(self) -> Stream:
        return await self._host.open_agreed(self._peer, (PING,))

    def agreed(self) -> None:
        """Nothing follows from it."""


def open_host(seed: bytes, *, swarm_key: bytes = b"") -> Libp2pHost:
    """A host on a free port of the loopback interface."""
    return Libp2pHost(seed, ["/ip4/127.0.0.1/tcp/0"], swarm_key=swarm_key)


def _addresses_of_machine() -> frozenset[str]:
    return frozenset((*reachable_hosts("0.0.0.0"), *reachable_hosts("::")))


async def _close_all(connections: Sequence[GuardedMuxer], reason: str) -> None:
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.session.close, reason)
