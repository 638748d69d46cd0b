"""Pipes: one long-lived one-way stream of frames to each neighbour, with a heartbeat that knows the clocks.

A pipe carries many sessions. Messages to ourselves take the same way without a stream. The reading side
only hands messages on, it neither computes nor sends, so two nodes whose pipes are full never wait for each other.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net.port import Host, Lane, PeerEvent, Stream
from protocols.errors import RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, short
from protocols.pipe.messages import PIPE, Message, Ping, Pong, Step, Token

PROTOCOL: Final = "/meshnode/pipe/1"
PING_SECONDS: Final = 1.0
FIRST_PINGS: Final = (0.02, 0.05, 0.1, 0.2)  # pauses on a new pipe: the very first ping pays for opening the way back
SEND_SECONDS: Final = 10.0  # a piece that can't be handed to the socket for so long breaks the pipe
PIECE_BYTES: Final = 1 << 16  # a link that takes less than 6.5 KB/s is none
OFFSET_SAMPLES: Final = 16
READ_BYTES: Final = 1 << 18
MOST_UNDER_WAY_US: Final = 3_600_000_000  # an hour: whatever a peer says about its clock

Receiver = Callable[[PeerId, Message, bytes, int], Awaitable[None]]  # peer, message, body, network_us
Mourner = Callable[[PeerId, str], None]  # peer, reason

log = structlog.get_logger()


def now_us() -> int:
    """The clock that `sent_us` speaks of: monotonic microseconds of this node."""
    return int(trio.current_time() * 1e6)


class ClockOffset:
    """A peer's clock minus ours, from the ping with the shortest round trip among the last ones (RFC 5905,
    section 8: the sample of least delay has the least error)."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque(maxlen=OFFSET_SAMPLES)  # (round trip, offset), us

    def add(self, pong: Pong, received_us: int) -> None:
        held_us = pong.sent_us - pong.received_us
        round_trip = (received_us - pong.ping_sent_us) - held_us
        if held_us < 0 or round_trip < 0:
            return  # not a time that can have passed
        offset = ((pong.received_us - pong.ping_sent_us) + (pong.sent_us - received_us)) // 2
        self._samples.append((round_trip, offset))

    @property
    def compared(self) -> int:
        """How many comparisons it rests on."""
        return len(self._samples)

    def under_way_us(self, sent_us: int, received_us: int) -> int:
        """How long a message was under way. 0 while the clocks are not compared yet."""
        if not self._samples:
            return 0
        return min(MOST_UNDER_WAY_US, max(0, received_us - (sent_us - min(self._samples)[1])))


class Pipes:
    """Sends messages to neighbours and hands on what they send."""

    name = "pipes"

    def __init__(self, host: Host) -> None:
        self._host = host
        self._streams: dict[PeerId, Stream] = {}
        self._locks: dict[PeerId, trio.Lock] = {}
        self._offsets: dict[PeerId, ClockOffset] = {}
        self._receiver: Receiver | None = None
        self._mourner: Mourner | None = None
        self._nursery: trio.Nursery | None = None
        self._answering: set[PeerId] = set()
        self._pinging: set[PeerId] = set()
        self._ping_number = 0
        host.handle(PROTOCOL, self._serve)

    def clock_of(self, peer: PeerId) -> ClockOffset:
        """What is known of a peer's clock."""
        return self._offsets.setdefault(peer, ClockOffset())

    def deliver_to(self, receiver: Receiver) -> None:
        """Set who takes the messages. Called in the order of arrival per peer; must return quickly."""
        self._receiver = receiver

    def report_to(self, mourner: Mourner) -> None:
        """Set who is told when our pipe to a peer breaks: what was sent last may not have arrived."""
        self._mourner = mourner

    async def send(self, peer: PeerId, message: Message, body: bytes = b"") -> None:
        """Send one message; steps and tokens are stamped with the time.

        Raises:
          PeerUnreachable: no connection, or it broke; the message may or may not have arrived.
          Declined: the peer does not admit us.

        If cancelled while sending: the frame is finished first (or given up after 10 s without progress), since
        others share the pipe.
        """
        if peer == self._host.peer_id:
            await self._hand_on(peer, message, body, 0)
            await trio.lowlevel.checkpoint()  # our stage starts to compute before the sender goes on
            return
        lock = self._locks.setdefault(peer, trio.Lock())
        try:
            lock.acquire_nowait()  # a free lock must not cost a round of the event loop on every token
        except trio.WouldBlock:
            await lock.acquire()
        try:
            stream = self._streams.get(peer)
            if stream is None:
                stream = await self._open(peer)
            await self._write(peer, stream, message, body)
        finally:
            lock.release()

    async def _open(self, peer: PeerId) -> Stream:
        stream = await self._host.open_stream(peer, PROTOCOL, Lane.TOKEN)
        self._streams[peer] = stream
        self._ping_number += 1
        await self._write(peer, stream, Ping(number=self._ping_number, sent_us=now_us()), b"")
        if self._nursery is not None:
            self._nursery.start_soon(self._compare_clocks, peer, stream)
        return stream

    async def _compare_clocks(self, peer: PeerId, stream: Stream) -> None:
        """A few pings soon after a pipe was opened, so that the first receipts tell its delay."""
        for pause in FIRST_PINGS:
            await trio.sleep(pause)
            if self._streams.get(peer) is not stream:
                return
            await self._ping(peer)

    async def _write(self, peer: PeerId, stream: Stream, message: Message, body: bytes) -> None:
        if isinstance(message, Step | Token):
            message = dataclasses.replace(message, sent_us=now_us())
        data = memoryview(pack(PIPE.encode(message), body))
        sent, why = 0, "the pipe broke"
        try:
            while sent < len(data):
                piece = data[sent : sent + PIECE_BYTES]
                with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_SECONDS) as scope:
                    await stream.send_all(piece)
                if scope.cancelled_caught:
                    raise PeerUnreachable(
                        f"{peer} took no data for {SEND_SECONDS:.0f} s; its pipe is closed", peer=peer
                    )
                sent += len(piece)
        except PeerUnreachable as error:
            why = str(error)
            raise
        finally:
            if sent < len(data):
                await self._drop(peer, stream, why)

    async def _drop(self, peer: PeerId, stream: Stream, reason: str) -> None:
        if self._streams.get(peer) is not stream:
            return
        del self._streams[peer]
        if self._mourner is not None:
            self._mourner(peer, reason)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await stream.reset()

    async def _hand_on(self, peer: PeerId, message: Message, body: bytes, network_us: int) -> None:
        if self._receiver is not None:
            await self._receiver(peer, message, body, network_us)

    async def _serve(self, stream: Stream) -> None:
        """Read one neighbour's pipe until it ends."""
        peer = stream.peer
        offset = self.clock_of(peer)
        reader = FrameReader()
        while data := await stream.receive_some(READ_BYTES):
            received_us = now_us()
            for frame in reader.feed(data):
                message = PIPE.decode(frame.header)
                if isinstance(message, Ping):
                    self._answer_soon(peer, message, received_us)
                elif isinstance(message, Pong):
                    offset.add(message, received_us)
                else:
                    sent_us = message.sent_us if isinstance(message, Step | Token) else received_us
                    await self._hand_on(peer, message, frame.body, offset.under_way_us(sent_us, received_us))
        if reader.pending:
            raise RemoteProtocolError(f"the pipe of {peer} was cut off inside a frame")

    def _answer_soon(self, peer: PeerId, ping: Ping, received_us: int) -> None:
        """Answer from a task of its own; while one answer waits for its pipe, further pings get none."""
        if self._nursery is not None and peer not in self._answering:
            self._answering.add(peer)
            self._nursery.start_soon(self._answer, peer, ping, received_us)

    async def _answer(self, peer: PeerId, ping: Ping, received_us: int) -> None:
        try:
            await self.send(
                peer,
                Pong(number=ping.number, ping_sent_us=ping.sent_us, received_us=received_us, sent_us=now_us()),
            )
        except (PeerUnreachable, Declined) as error:
            log.debug("pong.unsent", peer=short(peer), reason=str(error))
        finally:
            self._answering.discard(peer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare clocks over every open pipe, once a second, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._follow, self._host.events())
            task_status.started()
            try:
                while True:
                    await trio.sleep(PING_SECONDS)
                    for peer in list(self._streams):
                        if peer not in self._pinging:
                            self._pinging.add(peer)
                            nursery.start_soon(self._ping, peer)
            finally:
                self._nursery = None

    async def _ping(self, peer: PeerId) -> None:
        self._ping_number += 1
        try:
            await self.send(peer, Ping(number=self._ping_number, sent_us=now_us()))
        except (PeerUnreachable, Declined) as error:
            log.debug("ping.unsent", peer=short(peer), reason=str(error))
        finally:
            self._pinging.discard(peer)

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        """A pipe does not outlive its connection: the peer that comes back knows nothing of it."""
        async with events:
            async for event in events:
                stream = self._streams.get(event.peer)
                if not event.connected and stream is not None:
                    await self._drop(event.peer, stream, event.reason)
