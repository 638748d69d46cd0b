"""Pipes: one long-lived one-way stream of frames to each neighbour, with a heartbeat that knows the clocks.

A pipe carries many sessions. Messages to ourselves take the same way without a stream. The reading side
only hands messages on, it never computes, so a busy engine never makes the sender wait.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net.port import Host, Lane, Stream
from protocols.errors import RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, short
from protocols.pipe.messages import PIPE, Message, Ping, Pong, Step, Token

PROTOCOL: Final = "/meshnode/pipe/1"
PING_SECONDS: Final = 1.0
SEND_SECONDS: Final = 10.0  # a frame that can't be handed to the socket for so long breaks the pipe
OFFSET_SAMPLES: Final = 16
READ_BYTES: Final = 1 << 18

Receiver = Callable[[PeerId, Message, bytes, int], Awaitable[None]]  # peer, message, body, network_us

log = structlog.get_logger()


def now_us() -> int:
    """The clock that `sent_us` speaks of: monotonic microseconds of this machine."""
    return time.monotonic_ns() // 1000


class ClockOffset:
    """A peer's clock minus ours, from the ping with the shortest round trip among the last ones (RFC 5905,
    section 8: the sample of least delay has the least error)."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque(maxlen=OFFSET_SAMPLES)  # (round trip, offset), us

    def add(self, pong: Pong, received_us: int) -> None:
        round_trip = (received_us - pong.ping_sent_us) - (pong.sent_us - pong.received_us)
        offset = ((pong.received_us - pong.ping_sent_us) + (pong.sent_us - received_us)) // 2
        self._samples.append((round_trip, offset))

    def under_way_us(self, sent_us: int, received_us: int) -> int:
        """How long a message was under way. 0 while the clocks are not compared yet."""
        if not self._samples:
            return 0
        return max(0, received_us - (sent_us - min(self._samples)[1]))


class Pipes:
    """Sends messages to neighbours and hands on what they send."""

    name = "pipes"

    def __init__(self, host: Host) -> None:
        self._host = host
        self._streams: dict[PeerId, Stream] = {}
        self._locks: dict[PeerId, trio.Lock] = {}
        self._offsets: dict[PeerId, ClockOffset] = {}
        self._receiver: Receiver | None = None
        self._ping_number = 0
        host.handle(PROTOCOL, self._serve)

    def deliver_to(self, receiver: Receiver) -> None:
        """Set who takes the messages. Called in the order of arrival per peer; must return quickly."""
        self._receiver = receiver

    async def send(self, peer: PeerId, message: Message, body: bytes = b"") -> None:
        """Send one message; steps and tokens are stamped with the time.

        Raises:
          PeerUnreachable: no connection, or it broke; the message may or may not have arrived.
          Declined: the peer does not admit us.

        If cancelled while sending: the frame is finished first (10 s at most), since others share the pipe.
        """
        if peer == self._host.peer_id:
            await self._hand_on(peer, message, body, 0)
            return
        async with self._locks.setdefault(peer, trio.Lock()):
            stream = self._streams.get(peer)
            if stream is None:
                stream = await self._open(peer)
            await self._write(peer, stream, message, body)

    async def _open(self, peer: PeerId) -> Stream:
        stream = await self._host.open_stream(peer, PROTOCOL, Lane.TOKEN)
        self._streams[peer] = stream
        self._ping_number += 1
        await self._write(peer, stream, Ping(number=self._ping_number, sent_us=now_us()), b"")
        return stream

    async def _write(self, peer: PeerId, stream: Stream, message: Message, body: bytes) -> None:
        if isinstance(message, Step | Token):
            message = dataclasses.replace(message, sent_us=now_us())
        data = pack(PIPE.encode(message), body)
        sent = False
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_SECONDS):
                await stream.send_all(data)
                sent = True
        finally:
            if not sent:
                await self._drop(peer, stream)
        if not sent:
            raise PeerUnreachable(f"{peer} took no data for {SEND_SECONDS:.0f} s; its pipe is closed", peer=peer)

    async def _drop(self, peer: PeerId, stream: Stream) -> None:
        if self._streams.get(peer) is stream:
            del self._streams[peer]
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await stream.reset()

    async def _hand_on(self, peer: PeerId, message: Message, body: bytes, network_us: int) -> None:
        if self._receiver is not None:
            await self._receiver(peer, message, body, network_us)

    async def _serve(self, stream: Stream) -> None:
        """Read one neighbour's pipe until it ends."""
        peer = stream.peer
        offset = self._offsets.setdefault(peer, ClockOffset())
        reader = FrameReader()
        while data := await stream.receive_some(READ_BYTES):
            received_us = now_us()
            for frame in reader.feed(data):
                message = PIPE.decode(frame.header)
                if isinstance(message, Ping):
                    await self._answer(peer, message, received_us)
                elif isinstance(message, Pong):
                    offset.add(message, received_us)
                else:
                    sent_us = message.sent_us if isinstance(message, Step | Token) else received_us
                    await self._hand_on(peer, message, frame.body, offset.under_way_us(sent_us, received_us))
        if reader.pending:
            raise RemoteProtocolError(f"the pipe of {peer} was cut off inside a frame")

    async def _answer(self, peer: PeerId, ping: Ping, received_us: int) -> None:
        try:
            await self.send(
                peer,
                Pong(number=ping.number, ping_sent_us=ping.sent_us, received_us=received_us, sent_us=now_us()),
            )
        except (PeerUnreachable, Declined) as error:
            log.debug("pong.unsent", peer=short(peer), reason=str(error))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare clocks over every open pipe, once a second, until cancelled."""
        task_status.started()
        while True:
            await trio.sleep(PING_SECONDS)
            for peer in list(self._streams):
                self._ping_number += 1
                try:
                    await self.send(peer, Ping(number=self._ping_number, sent_us=now_us()))
                except (PeerUnreachable, Declined) as error:
                    log.debug("ping.unsent", peer=short(peer), reason=str(error))
