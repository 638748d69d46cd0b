"""Direct lanes: TLS 1.3 connections beside the libp2p one, on the same port, for tokens and for bulk.

A host has a certificate made at start. Over a libp2p stream of `/meshnode/lane/1`, which is authenticated by Noise
and served to admitted peers only, the dialler receives 66 bytes: the port where the host listens (2, 0 for "none"),
the SHA-256 of the certificate (32) and a token (32) that is good once and for ten seconds. It dials where it has
dialled the libp2p connection, or, when the host has dialled that, the host's address and this port. It accepts that
certificate and no other, and sends the token, a length (2) and a protocol id; one byte answers: 0 go on, 1 not
served, 2 not admitted, 3 too many. So the acceptor knows the dialler by its token and the dialler knows the acceptor
by its certificate; both came through the authenticated stream.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import ssl
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Protocol

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.tasks import Tasks
from meshnode.net.lane.tls_stream import Socket, TlsStream
from meshnode.net.peer_book import PeerBook
from meshnode.net.port import Stream
from meshnode.net.protocol_table import NOT_SERVED, STRANGER, ProtocolTable, refusal
from protocols.ids import PeerId

PROTOCOL: Final = "/meshnode/lane/1"
DIAL_S: Final = 3.0
TOKEN_S: Final = 10.0
RETRY_S: Final = 60.0  # after a failed dial the peer is asked over libp2p for so long
MAX_TOKENS: Final = 1024
MAX_LANES: Final = 64  # per peer
MAX_PROTOCOL_BYTES: Final = 1024
TOKEN_BYTES: Final = 32
_OFFER_BYTES: Final = 2 + 32 + TOKEN_BYTES
_GO_ON, _NOT_SERVED, _NOT_ADMITTED, _TOO_MANY = range(4)

_log = get_logger("lane")


@dataclass(frozen=True, slots=True)
class Ends:
    """The two ends of a libp2p connection: IP address and TCP port."""

    here: tuple[str, int]
    there: tuple[str, int]
    dialled: bool  # by us, so that `there` can be dialled


class Connections(Protocol):
    """The libp2p connections that lanes lie beside."""

    async def open_agreed(self, peer: PeerId, protocols: tuple[str, ...]) -> Stream:
        """A libp2p stream of one of these protocols. Raises PeerUnreachable, Declined."""

    def ends_of(self, peer: PeerId) -> Ends | None:
        """Of the connection to a peer; None when there is none."""

    def port_of(self, host: str) -> int:
        """Where this host listens at an address of this machine; 0: nowhere."""


class DirectLanes:
    """Offers, accepts and opens direct lanes."""

    def __init__(self, table: ProtocolTable, book: PeerBook, connections: Connections) -> None:
        """`table`: the protocols that are served; `book`: who is admitted."""
        self._table = table
        self._book = book
        self._connections = connections
        self._server, self._certificate_hash = _server_context()
        self._client = _client_context()
        self._tokens: OrderedDict[bytes, tuple[PeerId, float]] = OrderedDict()
        self._lanes: dict[PeerId, set[TlsStream]] = {}
        self._failed_at: dict[PeerId, float] = {}
        self._tasks = Tasks()
        table.add(PROTOCOL, self._offer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep lanes until cancelled; then all of them break."""
        try:
            await self._tasks.run(task_status=task_status)
        finally:
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
        self._tokens[token] = (stream.peer, now + TOKEN_S)
        ends = self._connections.ends_of(stream.peer)
        port = 0 if ends is None else self._connections.port_of(ends.here[0]) if ends.dialled else ends.here[1]
        await stream.send_all(port.to_bytes(2, "big") + self._certificate_hash + token)

    async def accept(self, sock: Socket, first: bytes) -> tuple[TlsStream, str] | None:
        """A lane and its protocol, from a connection whose `first` bytes are read; None: refused, and told so.

        Raises PeerUnreachable: it is no lane of ours.
        """
        stream = TlsStream(sock, self._server, server=True, first=first)
        kept = False
        try:
            await stream.handshake()
            protocol = await self._greet(stream)
            kept = bool(protocol)
        finally:
            if not kept:
                stream.break_off("refused")
        return (stream, protocol) if protocol else None

    async def serve(self, lane: tuple[TlsStream, str]) -> None:
        """Run the handler of an accepted lane until it ends."""
        stream, protocol = lane
        await self._table.run(protocol, stream)

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
        if peer not in self._book.admitted or peer not in self._book:
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
        stream.linger = self._tasks.start_soon

    # The dialling side

    async def open(self, peer: PeerId, protocol: str) -> TlsStream | None:
        """A lane to a peer, or None where a libp2p stream has to do.

        Raises Declined when the peer does not serve the protocol.
        """
        if self._failed_at.get(peer, -RETRY_S) > trio.current_time() - RETRY_S:
            return None
        try:
            port, certificate_hash, token = await self._ask(peer)
        except (PeerUnreachable, Declined):
            return None  # the libp2p stream that is tried next says why
        ends = self._connections.ends_of(peer)
        if ends is not None and (ends.dialled or port):
            stream: TlsStream | None = None
            opened = False
            try:
                with trio.move_on_after(DIAL_S):
                    stream = await self._dial(*(ends.there if ends.dialled else (ends.there[0], port)))
                    await self._introduce(stream, peer, certificate_hash, token, protocol)
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
        request = await self._connections.open_agreed(peer, (PROTOCOL,))
        try:
            offer = await _read(request, _OFFER_BYTES)
        finally:
            with trio.CancelScope(shield=True):
                await request.aclose()
        return int.from_bytes(offer[:2], "big"), offer[2:34], offer[34:]

    async def _dial(self, host: str, port: int) -> TlsStream:
        wire = await trio.open_tcp_stream(host, port)
        stream = TlsStream(wire.socket, self._client, server=False)
        await stream.handshake()
        return stream

    async def _introduce(
        self, stream: TlsStream, peer: PeerId, certificate_hash: bytes, token: bytes, protocol: str
    ) -> None:
        """Raises PeerUnreachable, Declined."""
        if not hmac.compare_digest(hashlib.sha256(stream.certificate).digest(), certificate_hash):
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
