"""py-libp2p 0.8.1 made fit for an open network: subclasses that replace its weak parts, nothing patched in place.

What the release does as shipped, and which class here stands in for it:

- an exception in any task of the swarm or of pubsub ends the process: `GuardedManager`, `GuardedHost`;
- an accepted connection holds one of 250 places until the host stops, even after it was closed; dials wait
  250 ms and blacklist a peer for a minute: `GuardedSwarm` upgrades sockets itself and nothing else;
- Yamux neither enforces windows nor tells a reset from an end: `GuardedMuxer` over our own `YamuxSession`;
- reads give up after 100 short pieces (`read_exactly`): `PlainWire.read` returns what was asked for, whole;
- hundreds of peers are dialled at whatever addresses others have told: `IdleConnector`;
- gossip goes to every peer that connects, drops bursts, and costs most where nothing happens: `gossip.py`;
- identify is asked of every peer and believed: never asked here; answered with what the asker may use, which
  Helia goes by.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import _mk_identify_protobuf
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.tools.anyio_service.trio_manager import TrioManager
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils import varint
from multiaddr import Multiaddr

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.connection_limits import MAX_CONNECTIONS, PER_PEER
from meshnode.net.libp2p.gossip import GuardedPubsub, make_router
from meshnode.net.libp2p.yamux import YamuxSession, YamuxStream
from meshnode.net.port import Take
from meshnode.net.swarm_key import Cover
from protocols.bucket import Bucket
from protocols.ids import PeerId
from protocols.multiaddr import Address, address_of

__all__ = ["IDENTIFY", "PING", "GuardedMuxer", "Libp2pStack", "Source"]

READ_BYTES: Final = 1 << 17
PINGS_PER_S: Final = 5.0  # that one stream answers; others ping once a second
PING_BURST: Final = 60.0
RESTART_S: Final = 1.0
FLUSH_S: Final = 0.5

_log = get_logger("net")

Source = Callable[[PeerId, tuple[str, ...]], Awaitable[YamuxStream]]  # opens a stream with one of some protocols
Offers = Callable[[PeerId], Sequence[str]]  # the protocols that a peer may use


class PlainWire(ReadWriteCloser):  # type: ignore[misc]  # the library has no types here
    """A TCP stream as the library wants it. `read(n)` returns n bytes, fewer only at the end."""

    def __init__(self, stream: trio.SocketStream, cover: Cover | None = None, first: bytes = b"") -> None:
        """`cover`: of a private network, over all that comes and goes; `first`: what has been read already."""
        self._stream = stream
        self._cover = cover
        self._buffer = bytearray(first if cover is None else cover.open(first))
        host, port = stream.socket.getpeername()[:2]
        self.remote = address_of(host, port)
        self.local: tuple[str, int] = stream.socket.getsockname()[:2]

    async def read(self, n: int | None = None) -> bytes:
        wanted = 1 if n is None else n
        while len(self._buffer) < wanted:
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(_reason(error)) from error
            if not data:
                break
            self._buffer += data if self._cover is None else self._cover.open(data)
        data = bytes(self._buffer if n is None else self._buffer[:n])
        del self._buffer[: len(data)]
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data if self._cover is None else self._cover.seal(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(_reason(error)) from error

    async def close_write(self) -> None:
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(_reason(error)) from error

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)

    def get_remote_address(self) -> tuple[str, int]:
        return self.remote.host, self.remote.port


class SecuredWire:
    """A Noise session as `YamuxSession` wants it."""

    def __init__(self, session: Any, plain: PlainWire) -> None:
        self._session = session
        self.plain = plain

    async def read(self) -> bytes:
        data: bytes = await self._session.read(None)
        return data

    async def write(self, data: bytes) -> None:
        await self._session.write(data)

    async def close_write(self) -> None:
        await self.plain.close_write()

    async def close(self) -> None:
        await self.plain.close()


class GuardedStream(IMuxedStream):  # type: ignore[misc]  # the library has no types here
    """One of our streams for the library's own protocols."""

    def __init__(self, stream: YamuxStream, muxed_conn: GuardedMuxer) -> None:
        self.stream = stream
        self.muxed_conn = muxed_conn
        self.allowance: Bucket | None = None  # of reads; without one, it is read as fast as it is written
        self._unread = b""

    async def read(self, n: int | None = None) -> bytes:
        """Up to n bytes. The library reads the length of a message byte by byte; each need not be a round of trio."""
        if not self._unread:
            try:
                self._unread = await self.stream.receive_some(READ_BYTES)
            except PeerUnreachable as error:
                raise MuxedStreamReset(str(error)) from error
            if not self._unread:
                raise MuxedStreamEOF("the stream has ended")
        if self.allowance is not None:
            await trio.sleep(self.allowance.spend(1.0, trio.current_time(), RESTART_S))
        size = len(self._unread) if n is None or n < 0 else n
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except PeerUnreachable as error:
            raise MuxedStreamReset(str(error)) from error

    async def close(self) -> None:
        try:
            await self.stream.send_eof()
        except PeerUnreachable as error:
            raise MuxedStreamReset(str(error)) from error

    async def reset(self) -> None:
        await self.stream.reset()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("cancel scopes do that")

    def get_remote_address(self) -> tuple[str, int]:
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> GuardedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()


class GuardedMuxer(IMuxedConn):  # type: ignore[misc]  # the library has no types here
    """One connection: the library's view of a `YamuxSession`."""

    def __init__(self, wire: SecuredWire, peer_id: Any, *, initiator: bool, watcher: ConnectionWatcher) -> None:
        self.peer_id = peer_id
        self.session = YamuxSession(PeerId(str(peer_id)), wire, initiator=initiator)
        self.remote: Address = wire.plain.remote
        self.local = wire.plain.local
        self.initiator = initiator
        self.event_started = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self._watcher = watcher

    @property
    def peer(self) -> PeerId:
        return self.session.peer

    @property
    def is_initiator(self) -> bool:
        return self.initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.session.ended

    @property
    def is_closed(self) -> bool:
        return bool(self.session.ended)

    async def start(self) -> None:
        """Run the connection until it ends."""
        self._watcher.connection_up(self)
        self.event_started.set()
        try:
            await self.session.run()
        finally:
            self._watcher.connection_over(self)
        if self.on_close is not None:
            await self.on_close()

    async def close(self) -> None:
        await self.session.close("this host has closed the connection")

    async def open_stream(self) -> GuardedStream:
        await trio.lowlevel.checkpoint()
        try:
            return GuardedStream(self.session.open(), self)
        except PeerUnreachable as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> GuardedStream:
        try:
            return GuardedStream(await self.session.accept(), self)
        except PeerUnreachable as error:
            raise MuxedConnUnavailable(str(error)) from error

    def get_transport_addresses(self) -> list[Any]:
        return [Multiaddr(str(self.remote))]

    def get_connection_type(self) -> Any:
        return ConnectionType.DIRECT

    def get_remote_address(self) -> tuple[str, int]:
        return self.remote.host, self.remote.port


class ConnectionWatcher:
    """Is told of every connection. Must not raise."""

    def connection_up(self, connection: GuardedMuxer) -> None:
        raise NotImplementedError

    def connection_over(self, connection: GuardedMuxer) -> None:
        raise NotImplementedError


class IdleConnector(AutoConnector):  # type: ignore[misc]  # the library has no types here
    """Dials nobody. The library's own dials any address that a peer has told us, until it has hundreds."""

    async def maybe_connect(self) -> None:
        """Whom to dial is decided by us."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Nothing to do."""


class GuardedSwarm(Swarm):  # type: ignore[misc]  # the library has no types here
    """The library's book of connections. Dialling and listening are done by the host."""

    def __init__(
        self, peer_id: Any, peerstore: Any, upgrader: Any, watcher: ConnectionWatcher, swarm_key: bytes
    ) -> None:
        config = ConnectionConfig(
            max_connections=MAX_CONNECTIONS,
            high_watermark=MAX_CONNECTIONS,
            low_watermark=0,
            min_connections=0,  # nobody is dialled but by us
            max_connections_per_peer=PER_PEER,
        )
        super().__init__(peer_id, peerstore, upgrader, transports=[], connection_config=config)
        self.auto_connector = IdleConnector(self)
        self._watcher = watcher
        self._swarm_key = swarm_key

    async def take_socket(self, stream: trio.SocketStream, dialled: PeerId | None, first: bytes = b"") -> None:
        """Make a connection of a TCP stream: Noise, then Yamux. Plaintext is not spoken.

        `first`: what has been read of it already. Raises whatever the handshake raises; the stream is closed then.
        """
        plain = PlainWire(stream, Cover(self._swarm_key) if self._swarm_key else None, first)
        initiator = dialled is not None
        try:
            raw = RawConnection(plain, initiator)
            expected = ID.from_string(dialled) if dialled is not None else None
            secured = await self.upgrader.upgrade_security(raw, initiator, expected)
            await self.upgrader.muxer_multistream.select_transport(secured)
            muxer = GuardedMuxer(
                SecuredWire(secured, plain), secured.get_remote_peer(), initiator=initiator, watcher=self._watcher
            )
            await self.add_conn(muxer, direction="outbound" if initiator else "inbound")
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await plain.close()
            raise

    async def notify_opened_stream(self, stream: Any) -> None:
        """Nobody is interested."""

    async def notify_closed_stream(self, stream: Any) -> None:
        """Nobody is interested."""


class GuardedHost(BasicHost):  # type: ignore[misc]  # the library has no types here
    """The library's host, as its own protocols see it. Streams are agreed on and opened by ours."""

    def __init__(
        self, swarm: GuardedSwarm, addresses: Callable[[], tuple[str, ...]], source: Source, offers: Offers
    ) -> None:
        self._our_addresses = addresses
        self._source = source
        self._offers = offers
        self.serve: Callable[[Any, YamuxStream], Awaitable[None]] | None = None
        super().__init__(swarm, disable_identify_address_discovery=True)
        self.remove_stream_handler(IDENTIFY_PUSH)
        self.set_stream_handler(IDENTIFY, self._answer_identify)

    async def _answer_identify(self, net_stream: Any) -> None:
        """Protocols that the asker may use: those of the library and of our own table alike."""
        stream: YamuxStream = net_stream.muxed_stream.stream
        answer = _mk_identify_protobuf(self, net_stream.muxed_stream.muxed_conn.get_transport_addresses()[0])
        answer.protocols[:] = self._offers(stream.peer)
        data = answer.SerializeToString()
        await stream.send_all(varint.encode_uvarint(len(data)) + data)
        await stream.send_eof()

    def get_transport_addrs(self) -> list[Any]:
        return [Multiaddr(address.partition("/p2p/")[0]) for address in self._our_addresses()]

    async def _swarm_stream_handler(self, net_stream: Any) -> None:
        stream: YamuxStream = net_stream.muxed_stream.stream
        try:
            if self.serve is not None:
                await self.serve(net_stream, stream)
        except Exception as error:  # noqa: BLE001 - the border: the library would end the process
            _log.warning("stream.contained", peer=stream.peer, reason=_reason(error))
            stream.reset_nowait()

    async def new_stream(self, peer_id: Any, protocol_ids: Sequence[Any]) -> Any:
        """For pubsub. Raises SwarmException, upon which it tries again while the peer is connected."""
        peer = PeerId(str(peer_id))
        connections = [c for c in self.get_network().get_connections(peer_id) if not c.is_closed]
        if not connections:
            raise SwarmException(f"{peer} is not connected")
        try:
            stream = await self._source(peer, tuple(str(name) for name in protocol_ids))
        except (PeerUnreachable, Declined) as error:
            raise SwarmException(str(error)) from error
        connection = next((c for c in connections if c.muxed_conn.session is stream.session), connections[0])
        net_stream = await connection._add_stream(GuardedStream(stream, connection.muxed_conn))
        net_stream.set_protocol(protocol_ids[0])
        return net_stream

    def _schedule_identify(self, peer_id: Any, *, reason: str) -> None:
        """What a peer says about itself comes in signed adverts, not by identify."""

    async def _push_identify_to_all_peers(self) -> None:
        """As above."""


class GuardedManager(TrioManager):  # type: ignore[misc]  # the library has no types here
    """Runs the tasks of a library service; what they raise is logged and goes no further."""

    def run_task(self, async_fn: Any, *args: Any, daemon: bool = False, name: Any = None, **more: Any) -> None:
        if more.get("_internal"):
            super().run_task(async_fn, *args, daemon=daemon, name=name, **more)
        elif self._task_nursery is not None and self.is_running:
            self._task_nursery.start_soon(self._contain, async_fn, args, daemon)

    async def _contain(self, async_fn: Any, args: tuple[Any, ...], daemon: bool) -> None:
        while True:
            try:
                await async_fn(*args)
                return
            except Exception as error:  # noqa: BLE001 - the border: the library would stop the service
                name = getattr(async_fn, "__qualname__", repr(async_fn))
                _log.warning("task.contained", task=name, reason=_reason(error))
            if not daemon:
                return
            await trio.sleep(RESTART_S)


class GuardedUpgrader(TransportUpgrader):  # type: ignore[misc]  # the library has no types here
    """Noise and Yamux, nothing else."""

    def __init__(self, key_pair: Any) -> None:
        noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
        super().__init__({NOISE: noise}, {})
        self.muxer_multistream = MuxerMultistream({YAMUX: GuardedMuxer})


@asynccontextmanager
async def _background(service: Any) -> AsyncIterator[None]:
    """Run a library service while the block runs."""
    manager = GuardedManager(service)
    service._manager = manager
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await manager.wait_started()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                await manager.stop()
            nursery.cancel_scope.cancel()


class Libp2pStack:
    """Swarm, host and gossip of the library, put together.

    Args:
      seed: the 32 bytes of the Ed25519 node key.
      watcher: told of connections.
      addresses: where we listen, for identify and gossip's peer records.
      source: opens a stream for the library.
      offers: the protocols that a peer is told that it may use.
      admits: whether a peer may gossip with us.
      swarm_key: of a private IPFS network; empty: none.
    """

    def __init__(
        self,
        seed: bytes,
        watcher: ConnectionWatcher,
        addresses: Callable[[], tuple[str, ...]],
        source: Source,
        offers: Offers,
        admits: Callable[[PeerId], bool],
        swarm_key: bytes,
    ) -> None:
        _silence()
        key_pair = create_new_key_pair(seed)
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        self.peer = PeerId(str(peer_id))
        self.swarm = GuardedSwarm(peer_id, peerstore, GuardedUpgrader(key_pair), watcher, swarm_key)
        self.host = GuardedHost(self.swarm, addresses, source, offers)
        self.router = make_router()
        self.pubsub = GuardedPubsub(self.host, self.router, admits)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything runs while the block runs; connections are closed when it ends."""
        async with _background(self.swarm):
            await self.swarm.event_background_nursery_created.wait()
            async with _background(self.pubsub), _background(self.router):
                await self.pubsub.wait_until_ready()
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                        await self.host.close()

    async def subscribe(self, topic: str, take: Take) -> None:
        """Take part in a topic."""
        self.pubsub.takers[topic] = take
        await self.pubsub.subscribe(topic)

    async def flush_gossip(self) -> None:
        """Wait until what was published has been handed to the connections; half a second at most."""
        with trio.move_on_after(FLUSH_S):
            while any(len(queue) for queue in self.pubsub.peer_queues.values()):  # noqa: ASYNC110  # no event there
                await trio.sleep(FLUSH_S / 50)

    @property
    def protocols(self) -> tuple[str, ...]:
        """What the library itself handles."""
        return tuple(str(name) for name in self.host.multiselect.handlers if name)

    def serves(self, protocol: str) -> bool:
        """Whether the library itself handles this protocol."""
        return protocol in self.host.multiselect.handlers

    async def handle(self, protocol: str, net_stream: Any, stream: YamuxStream) -> None:
        """Let the library handle a stream that was agreed on."""
        net_stream.set_protocol(protocol)
        if protocol == PING:
            net_stream.muxed_stream.allowance = Bucket(PINGS_PER_S, PING_BURST, trio.current_time())
        try:
            await self.host.multiselect.handlers[protocol](net_stream)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()


def _silence() -> None:
    """What matters comes back to us as an exception; the rest would let strangers write into our logs."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
