"""What services see of the network. Implemented by `libp2p_host.py` and `memory_host.py`.

One conformance suite (`tests/conformance/check_host.py`) runs on every implementation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

import trio

from meshnode.core.signal import Changes
from protocols.ids import PeerId

STALL_S: Final = 60.0  # a reader that takes nothing for so long breaks the stream
MAX_GOSSIP_BYTES: Final = 1 << 16


class Lane(Enum):
    """What a stream is for; it decides which connection carries it.

    CONTROL: a libp2p stream (Noise, Yamux) on the shared connection.
    TOKEN, BULK: a TLS 1.3 connection of its own where the peer can be dialled directly, bound to the peer id
    by a certificate hash and one-use token exchanged over a libp2p stream; a libp2p stream elsewhere.
    Bulk never shares a connection with tokens: it multiplies their latency by five.
    """

    CONTROL = "control"
    TOKEN = "token"
    BULK = "bulk"


class Stream(Protocol):
    """A byte stream to an authenticated peer. Errors of the other side or the wire: PeerUnreachable."""

    @property
    def peer(self) -> PeerId: ...

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send everything. A reader that takes nothing for `STALL_S` (60) breaks the stream, not sooner.

        If cancelled: an unknown part was sent; the stream must be closed.
        """

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """At least one byte, or b"" at the clean end of the stream. If cancelled: nothing was taken."""

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; reading goes on."""

    async def aclose(self) -> None:
        """Close both directions. Never raises for a stream that is already broken; never blocks for long."""

    async def reset(self) -> None:
        """Drop the stream at once; the peer sees PeerUnreachable, not a clean end."""


Handler = Callable[[Stream], Awaitable[None]]
Take = Callable[[PeerId, bytes], bool]  # (forwarder, data) -> worth passing on


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """A connection to a peer came up (first one) or went away (last one, or heartbeat missed)."""

    peer: PeerId
    connected: bool
    reason: str = ""


class LocalNetwork(Protocol):
    """Datagrams to and from whoever is on the same local networks, friend or foe. Nothing raises."""

    async def renew(self) -> None:
        """Take part in the networks that there are now."""

    async def send(self, data: bytes) -> None:
        """To everybody on each of them, as far as it is up."""

    async def receive(self) -> bytes:
        """The next datagram of anybody, our own ones too. If cancelled: nothing was taken."""

    def close(self) -> None:
        """Nothing is sent or received any more."""


class Host(Protocol):
    """One node's place on the network."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs where we listen, each ending in /p2p/<our peer id>. Known once `run` has started; see
        `surroundings`."""

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Connected peers, sorted; guests are not among them."""

    @property
    def guests(self) -> tuple[PeerId, ...]:
        """Connected guests (see `welcome`), sorted."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled.

        Raises ConfigError before `started()` if an address can't be used (the port is taken, say).
        """

    def handle(
        self,
        protocol: str,
        handler: Handler,
        *,
        open_to_strangers: bool | Callable[[], bool] = False,
        bounded: bool = True,
    ) -> None:
        """Serve a protocol id. Call before `run`.

        bounded: a peer that opens more than `STREAMS_PER_S` (protocol_table.py) has them reset.

        A stream of a peer that is not admitted (see `admit`) is refused unless `open_to_strangers` (a function
        is asked each time), which few protocols set. The handler runs in the host's own nursery: MeshError ends
        the stream, any other exception is logged with its traceback and ends the stream, never the process. The
        stream is closed when the handler returns.
        """

    def on_flood(self, listener: Callable[[PeerId, str], None]) -> None:
        """Tell a listener (peer, protocol) of streams that were reset because they came too fast."""

    def admit(self, peer: PeerId, admitted: bool) -> None:
        """Membership of a peer was proven (or withdrawn: its connections are closed)."""

    def welcome(self, peer: PeerId, protocols: Sequence[str]) -> None:
        """Make a peer a guest: no member of our network, but it may use these protocols.

        Everything else is refused to it, it gets and brings no gossip, and nobody hears of it in `peers` and
        `events`. Unlike a stranger it stays connected.
        """

    async def dismiss(self, peer: PeerId, reason: str) -> None:
        """It is no guest any more; its connections are closed. Nothing happens for a peer that is none."""

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Make sure that there is a connection. Raises PeerUnreachable (10 s at most)."""

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close every connection to the peer."""

    def doubt(self, peer: PeerId) -> None:
        """Somebody else has lost a peer: see soon whether it still answers us. Nothing happens if it is not here."""

    async def open_stream(self, peer: PeerId, protocol: str, lane: Lane = Lane.CONTROL) -> Stream:
        """Open a stream to a connected peer. Raises PeerUnreachable, or Declined if the peer does not
        serve the protocol or does not admit us."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip a message (at most 64 KiB; LocalProtocolError above). Returns at once; delivery is not certain."""

    def subscribe(self, topic: str, take: Take) -> None:
        """Take part in a topic. Call before `run`, once for each topic.

        `take` gets every message of others once, as it comes, and says whether it is worth passing on; if it raises,
        the message is dropped. It must return quickly.
        """

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new subscription to connection events, beginning with one event per peer connected now."""

    def guest_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """The same about guests, which `events` leaves out."""

    @property
    def links(self) -> Changes:
        """Whenever somebody connects or goes, and when a round trip is first measured or moves by a third."""

    @property
    def surroundings(self) -> Changes:
        """Whenever `addresses` may have changed, or the network may be back: what failed before may work now."""

    def round_trip_us(self, peer: PeerId) -> int | None:
        """The heartbeat's median round trip of the last minute, in microseconds; None when unknown."""
