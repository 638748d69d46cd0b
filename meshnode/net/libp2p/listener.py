"""One TCP port for everything: libp2p connections and direct lanes are told apart by their first bytes."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Sequence
from typing import Final, Protocol

import trio

from meshnode.core.errors import ConfigError, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.addresses import reachable_hosts
from meshnode.net.connection_limits import CALL_BURST, CALL_WAIT_S, CALLS_PER_S, PendingConnections
from meshnode.net.lane.lane import DirectLanes
from meshnode.net.libp2p.dialler import innermost
from protocols.bucket import Buckets
from protocols.errors import RemoteProtocolError
from protocols.multiaddr import Address, parse_address

HANDSHAKE_S: Final = 10.0
ACCEPT_PAUSE_S: Final = 0.1
BACKLOG: Final = 1024
FIRST_BYTES: Final = 512  # a ClientHello or the begin of a libp2p handshake; the rest stays in the socket
HEADER_BYTES: Final = 6  # that a ClientHello is known by

_log = get_logger("net")


class TakeLibp2p(Protocol):
    def __call__(self, stream: trio.SocketStream, first: bytes) -> Awaitable[None]:
        """Make a libp2p connection of a stream whose `first` bytes are read. Raises whatever a handshake raises."""


def begins_tls(first: bytes) -> bool | None:
    """Whether a connection begins with a TLS ClientHello; None while more bytes decide.

    RFC 8446, section 5.1: type 22, version 3.1 or 3.3, length, then the message type 1. A libp2p connection begins
    with 19, the length of "/multistream/1.0.0"; under a swarm key with 24 random bytes, which look like a
    ClientHello once in two thousand million connections, and then the next dial works.
    """
    head = first[:HEADER_BYTES]
    if not head:
        return None
    for index, allowed in enumerate((b"\x16", b"\x03", b"\x01\x03")):
        if len(head) > index and head[index] not in allowed:
            return False
    return None if len(head) < HEADER_BYTES else head[5] == 1


class Listener:
    """Accepts connections on every listen address."""

    def __init__(self, addresses: Sequence[str], take_libp2p: TakeLibp2p, lanes: DirectLanes) -> None:
        """Raises ConfigError: an address that can't be used for listening."""
        self._addresses = [_listen_address(text) for text in addresses]
        self._take_libp2p = take_libp2p
        self._lanes = lanes
        self._pending = PendingConnections()
        self._calls = Buckets(CALLS_PER_S, CALL_BURST)
        self._sockets: list[trio.SocketListener] = []

    @property
    def bound(self) -> list[tuple[str, int]]:
        """Address and port of every socket."""
        return [listener.socket.getsockname()[:2] for listener in self._sockets]

    def is_ours(self, host: str, port: int) -> bool:
        """Whether a dial to this endpoint would only reach ourselves."""
        return any(port == our_port and host in reachable_hosts(bound) for bound, our_port in self.bound)

    async def open(self) -> None:
        """Bind every address. Raises ConfigError; nothing is bound then."""
        try:
            for address in self._addresses:
                self._sockets.append(await _bind(address))
        except ConfigError:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        sockets, self._sockets = self._sockets, []
        for listener in sockets:
            await listener.aclose()

    async def run(self) -> None:
        """Accept until cancelled; whoever is accepted ends with it."""
        async with trio.open_nursery() as nursery:
            for listener in self._sockets:
                nursery.start_soon(self._accept_forever, listener, nursery)
            await trio.sleep_forever()

    async def _accept_forever(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                sock, (host, *_) = await listener.socket.accept()
            except OSError as error:  # no file descriptors left, or the caller is gone already
                _log.warning("connection.unaccepted", reason=str(error))
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            nursery.start_soon(self._take_caller, sock, host)

    async def _take_caller(self, sock: trio.socket.SocketType, host: str) -> None:
        lane = None
        with self._pending.enter(host, HANDSHAKE_S) as scope:
            try:
                sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
                now = trio.current_time()
                await trio.sleep(self._calls.of(host, now).spend(1.0, now, CALL_WAIT_S))
                first, is_tls = b"", None
                while is_tls is None:
                    piece = await sock.recv(FIRST_BYTES)
                    if not piece:
                        raise PeerUnreachable("it sent nothing that could be understood")
                    first += piece
                    is_tls = begins_tls(first)
                if is_tls:
                    lane = await self._lanes.accept(sock, first)
                else:
                    await self._take_libp2p(trio.SocketStream(sock), first)
                    return
            except Exception as error:  # noqa: BLE001 - the border: whatever a stranger's handshake provokes
                _log.debug("handshake.failed", address=host, reason=innermost(error))
        if lane is None or scope.cancelled_caught:
            sock.close()
        else:
            await self._lanes.serve(lane)


def _listen_address(text: str) -> Address:
    try:
        address = parse_address(text)
    except RemoteProtocolError as error:
        raise ConfigError(f"We can't listen at {text!r}: {error}") from error
    if not address.kind.startswith("ip") or address.peer:
        raise ConfigError(f"We can't listen at {text!r}; write an IP address of this machine: /ip4/0.0.0.0/tcp/4331")
    return address


async def _bind(address: Address) -> trio.SocketListener:
    """Without SO_REUSEPORT, with which the library would share a port with whoever else uses it."""
    try:
        (listener,) = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    except OSError as error:
        advice = "Stop the program that uses this port, or choose another"
        if error.errno == errno.EADDRNOTAVAIL:
            advice = "No interface of this machine has this address; choose one that it has, or 0.0.0.0 for all,"
        raise ConfigError(
            f"We can't listen at {address}: {error.strerror or error}. {advice} with --listen or network.listen "
            "(port 0 takes any free one)."
        ) from error
    return listener
