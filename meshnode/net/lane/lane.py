"""Direct lanes: TLS 1.3 connections beside the libp2p one, for tokens and for bulk.

A host listens on a second port with a certificate made at start. Over a libp2p stream of `/meshnode/lane/1`,
which is authenticated by Noise and served to admitted peers only, the dialler receives 66 bytes: the port (2, 0 for
"none"), the SHA-256 of the certificate (32) and a token (32) that is good once and for ten seconds. It dials the
address of the libp2p connection, accepts that certificate and no other, and sends the token, a length (2) and a
protocol id; one byte answers: 0 go on, 1 not served, 2 not admitted, 3 too many. So the acceptor knows the dialler
by its token and the dialler knows the acceptor by its certificate; both came through the authenticated stream.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import ssl
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.lane.tls_stream import TlsStream
from meshnode.net.peer_book import Roster
from meshnode.net.pending import PendingConnections
from meshnode.net.port import Stream
from meshnode.net.protocol_table import NOT_SERVED, STRANGER, ProtocolTable, refusal
from protocols.ids import PeerId

PROTOCOL: Final = "/meshnode/lane/1"
DIAL_SECONDS: Final = 3.0
HANDSHAKE_SECONDS: Final = 5.0
TOKEN_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 60.0  # after a failed dial the peer is asked over libp2p for so long
MAX_TOKENS: Final = 1024
MAX_LANES: Final = 64  # per peer
MAX_PROTOCOL_BYTES: Final = 1024
TOKEN_BYTES: Final = 32
_OFFER_BYTES: Final = 2 + 32 + TOKEN_BYTES
_GO_ON, _NOT_SERVED, _NOT_ADMITTED, _TOO_MANY = range(4)

_log = get_logger("lane")


class DirectLanes:
    """Offers, accepts and opens direct lanes.

    Args:
      table: the protocols that are served.
      roster: who is admitted.
      open_stream: opens a libp2p stream of `PROTOCOL` to a peer.
      local_host: the address of this machine on the libp2p connection of a peer, "" when there is none.
      remote_host: the address of the peer on it.
    """

    def __init__(
        self,
        table: ProtocolTable,
        roster: Roster,
        open_stream: Callable[[PeerId], Awaitable[Stream]],
        local_host: Callable[[PeerId], str],
        remote_host: Callable[[PeerId], str],
    ) -> None:
        self._table = table
        self._roster = roster
        self._open_stream = open_stream
        self._local_host = local_host
        self._remote_host = remote_host
        self._server, self._certificate_hash = _server_context()
        self._client = _client_context()
        self._ports: dict[str, int] = {}
        self._tokens: OrderedDict[bytes, tuple[PeerId, float]] = OrderedDict()
        self._lanes: dict[PeerId, set[TlsStream]] = {}
        self._failed_at: dict[PeerId, float] = {}
        self._pending = PendingConnections()
        self._nursery: trio.Nursery | None = None
        table.add(PROTOCOL, self._offer)

    async def run(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept lanes until cancelled; then all of them break."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in listeners:
                    host, port = listener.socket.getsockname()[:2]
                    self._ports[host] = port
                    nursery.start_soon(self._accept_forever, listener)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for peer in list(self._lanes):
                self.break_off(peer, "this host has stopped")

    def break_off(self, peer: PeerId, reason: str) -> None:
        """Drop every lane to or from a peer, and the tokens it holds."""
        for stream in self._lanes.pop(peer, set()):
            stream.on_end = None
            stream.break_off(f"{peer}: {reason}")
        for token in [token for token, (owner, _) in self._tokens.items() if owner == peer]:
            del self._tokens[token]
        self._failed_at.pop(peer, None)

    # The accepting side

    async def _offer(self, stream: Stream) -> None:
        now = trio.current_time()
        while self._tokens and (len(self._tokens) >= MAX_TOKENS or next(iter(self._tokens.values()))[1] < now):
            self._tokens.popitem(last=False)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._tokens[token] = (stream.peer, now + TOKEN_SECONDS)
        host = self._local_host(stream.peer)
        port = self._ports.get(host) or self._ports.get("::" if ":" in host else "0.0.0.0") or 0
        await stream.send_all(port.to_bytes(2, "big") + self._certificate_hash + token)

    async def _accept_forever(self, listener: trio.SocketListener) -> None:
        assert self._nursery is not None
        while True:
            try:
                sock, (host, *_) = await listener.socket.accept()
            except OSError as error:  # no file descriptors left, or the caller is gone already
                _log.warning("lane.unaccepted", reason=str(error))
                await trio.sleep(0.1)
                continue
            self._nursery.start_soon(self._take_caller, sock, host)

    async def _take_caller(self, sock: trio.socket.SocketType, host: str) -> None:
        stream = TlsStream(sock, self._server, server=True)
        protocol = ""
        with self._pending.enter(host, HANDSHAKE_SECONDS):
            try:
                _prepare(sock)
                await stream.handshake()
                protocol = await self._greet(stream)
            except (PeerUnreachable, OSError) as error:
                _log.debug("lane.refused", address=host, reason=str(error))
        if protocol:
            await self._table.run(protocol, stream)
        else:
            stream.break_off("refused")

    async def _greet(self, stream: TlsStream) -> str:
        """Whose lane it is and for which protocol; "" when it is refused. Raises PeerUnreachable."""
        token = await _read(stream, TOKEN_BYTES)
        peer, expires = self._tokens.pop(token, (PeerId(""), 0.0))
        if not peer or expires < trio.current_time():
            raise PeerUnreachable("it showed no token of ours")
        stream.peer = peer
        size = int.from_bytes(await _read(stream, 2), "big")
        if not 0 < size <= MAX_PROTOCOL_BYTES:
            raise PeerUnreachable(f"it asked for a protocol with a name of {size} bytes", peer=peer)
        protocol = (await _read(stream, size)).decode("utf-8", "replace")
        answer = _GO_ON
        if peer not in self._roster.admitted or peer not in self._roster:
            answer = _NOT_ADMITTED
        elif protocol not in self._table or protocol == PROTOCOL:
            answer = _NOT_SERVED
        elif len(self._lanes.get(peer, ())) >= MAX_LANES:
            answer = _TOO_MANY
        await stream.send_all(bytes((answer,)))
        if answer != _GO_ON:
            await stream.aclose()
            return ""
        self._keep(stream)
        return protocol

    def _keep(self, stream: TlsStream) -> None:
        lanes = self._lanes.setdefault(stream.peer, set())
        lanes.add(stream)
        stream.on_end = lambda: lanes.discard(stream)
        stream.linger = self._linger

    def _linger(self, drain: Callable[[], Any]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(drain)

    # The dialling side

    async def open(self, peer: PeerId, protocol: str) -> TlsStream | None:
        """A lane to a peer, or None where a libp2p stream has to do.

        Raises Declined when the peer does not serve the protocol.
        """
        if self._nursery is None or self._failed_at.get(peer, -RETRY_SECONDS) > trio.current_time() - RETRY_SECONDS:
            return None
        try:
            port, pin, token = await self._ask(peer)
        except (PeerUnreachable, Declined):
            return None  # the libp2p stream that is tried next says why
        if port:
            stream: TlsStream | None = None
            opened = False
            try:
                with trio.move_on_after(DIAL_SECONDS):
                    stream = await self._dial(self._remote_host(peer), port)
                    await self._introduce(stream, peer, pin, token, protocol)
                    opened = True
                    return stream
            except (PeerUnreachable, OSError) as error:
                _log.info("lane.failed", peer=peer, reason=str(error))
            finally:
                if stream is not None and not opened:
                    stream.break_off("the lane was not opened")
        self._failed_at[peer] = trio.current_time()
        return None

    async def _ask(self, peer: PeerId) -> tuple[int, bytes, bytes]:
        request = await self._open_stream(peer)
        try:
            offer = await _read(request, _OFFER_BYTES)
        finally:
            with trio.CancelScope(shield=True):
                await request.aclose()
        return int.from_bytes(offer[:2], "big"), offer[2:34], offer[34:]

    async def _dial(self, host: str, port: int) -> TlsStream:
        wire = await trio.open_tcp_stream(host, port)
        stream = TlsStream(wire.socket, self._client, server=False)
        _prepare(wire.socket)
        await stream.handshake()
        return stream

    async def _introduce(self, stream: TlsStream, peer: PeerId, pin: bytes, token: bytes, protocol: str) -> None:
        """Raises PeerUnreachable, Declined."""
        if not hmac.compare_digest(hashlib.sha256(stream.certificate).digest(), pin):
            raise PeerUnreachable(f"somebody else answers at the lane of {peer}", peer=peer)
        stream.peer = peer
        name = protocol.encode()
        await stream.send_all(token + len(name).to_bytes(2, "big") + name)
        (answer,) = await _read(stream, 1)
        if answer == _NOT_SERVED:
            raise refusal(peer, protocol, NOT_SERVED)
        if answer == _NOT_ADMITTED:
            raise refusal(peer, protocol, STRANGER)
        if answer != _GO_ON:
            raise PeerUnreachable(f"{peer} has {MAX_LANES} lanes of ours open already", peer=peer)
        self._keep(stream)


async def _read(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            raise PeerUnreachable("the stream ended inside the greeting", peer=stream.peer)
        data += piece
    return data


def _prepare(sock: trio.socket.SocketType) -> None:
    sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)


def _server_context() -> tuple[ssl.SSLContext, bytes]:
    """TLS 1.3 with a fresh self-signed certificate, and the certificate's SHA-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meshnode")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Its hash is what counts, so no clock is asked.
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes: each lane has its own token
    with tempfile.NamedTemporaryFile() as file:  # mode 0600; ssl reads keys from files only
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context, certificate.fingerprint(hashes.SHA256())


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # `_introduce` compares the hash instead
    return context
