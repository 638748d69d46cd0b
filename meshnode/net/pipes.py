"""Pipes: one long-lived one-way stream of frames to each neighbour, with a heartbeat that knows the clocks.

A pipe carries many sessions. Messages to ourselves take the same way without a stream. The reading side
only hands messages on, it neither computes nor sends, so two nodes whose pipes are full never wait for each other.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.tasks import Tasks
from meshnode.net.port import Host, Lane, PeerEvent, Stream
from protocols.bucket import Buckets
from protocols.errors import RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, short
from protocols.pipe.messages import PIPE, Message, Open, Ping, Pong, Step, Token

PROTOCOL: Final = "/meshnode/pipe/1"
PING_S: Final = 1.0  # between pings while messages flow; doubles while none do
LONGEST_PING_S: Final = 60.0
FIRST_PINGS: Final = (0.02, 0.05, 0.1, 0.2)  # when messages begin to flow; the first one pays for the way back
SEND_S: Final = 10.0  # a piece that can't be handed to the socket for so long breaks the pipe
PIECE_BYTES: Final = 1 << 16  # a link that takes less than 6.5 KB/s is none
OFFSET_SAMPLES: Final = 16
OFFSET_US: Final = 20_000_000  # clocks of two devices part by a millisecond in that time
READ_BYTES: Final = 1 << 18
# What one peer may send, in steps and tokens; eight sessions of a fast model need a third of it. Beyond, it is read
# more slowly. An opening takes room in the engine, a ping is answered.
MESSAGES_PER_S: Final = 1000.0
MESSAGE_BURST: Final = 5000.0
COSTS: Final[Mapping[type, float]] = {Open: 20.0, Ping: 10.0}
SLOW_S: Final = 1.0  # the longest pause
MOST_UNDER_WAY_US: Final = 3_600_000_000  # an hour: whatever a peer says about its clock

M = TypeVar("M", bound=Message)
Handler = Callable[[PeerId, M, bytes, int], None]  # peer, message, body, microseconds under way
Listener = Callable[[PeerId, str], None]  # peer, reason

_log = get_logger("pipes")


def now_us() -> int:
    """The clock that `sent_us` speaks of: monotonic microseconds of this node."""
    return int(trio.current_time() * 1e6)


class ClockOffset:
    """A peer's clock minus ours, from the ping with the shortest round trip among the last ones (RFC 5905,
    section 8: the sample of least delay has the least error)."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int, int]] = deque(maxlen=OFFSET_SAMPLES)  # (round trip, offset, when), us

    def add(self, pong: Pong, received_us: int) -> None:
        held_us = pong.sent_us - pong.received_us
        round_trip = (received_us - pong.ping_sent_us) - held_us
        if held_us < 0 or round_trip < 0:
            return  # not a time that can have passed
        offset = ((pong.received_us - pong.ping_sent_us) + (pong.sent_us - received_us)) // 2
        while self._samples and self._samples[0][2] < received_us - OFFSET_US:
            self._samples.popleft()
        self._samples.append((round_trip, offset, received_us))

    @property
    def compared(self) -> int:
        """How many comparisons it rests on."""
        return len(self._samples)

    def under_way_us(self, sent_us: int, received_us: int) -> int:
        """How long a message was under way. 0 while the clocks are not compared yet."""
        if not self._samples:
            return 0
        return min(MOST_UNDER_WAY_US, max(0, received_us - (sent_us - min(self._samples)[1])))


class _Pipe:
    """What is known of one neighbour, and our way to it while there is one."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.stream: Stream | None = None
        self.lock = trio.Lock()
        self.clock = ClockOffset()
        self.answering = False
        self.idle = True  # no message since the last ping
        self.used = trio.Event()

    def use(self) -> None:
        """A message passes."""
        self.idle = False
        self.used.set()


class Pipes:
    """Sends messages to neighbours and hands on what they send."""

    name = "pipes"

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pipes: dict[PeerId, _Pipe] = {}
        self._handlers: dict[type, Handler[Any]] = {}
        self._listeners: list[Listener] = []
        self._tasks = Tasks()
        self._allowances = Buckets(MESSAGES_PER_S, MESSAGE_BURST)
        self.flooded: Callable[[PeerId], None] = lambda peer: None  # told who is read more slowly than it sends
        self.pings = 0  # sent so far
        host.handle(PROTOCOL, self._serve)

    def clock_of(self, peer: PeerId) -> ClockOffset:
        """What is known of a peer's clock."""
        return self._pipe(peer).clock

    def handle(self, kind: type[M], handler: Handler[M]) -> None:
        """Hand over messages of one kind in the order of arrival per peer; those without a handler are dropped.

        The handler must return at once. RemoteProtocolError from it ends the sender's pipe.
        """
        self._handlers[kind] = handler

    def on_lost(self, listener: Listener) -> None:
        """Tell a listener when our pipe or connection to a peer breaks: what was sent last may not have arrived."""
        self._listeners.append(listener)

    async def send(self, peer: PeerId, message: Message, body: bytes = b"") -> None:
        """Send one message; steps and tokens are stamped with the time.

        Raises:
          PeerUnreachable: no connection, or it broke; the message may or may not have arrived.
          Declined: the peer does not admit us.

        If cancelled while sending: the frame is finished first (or given up after 10 s without progress), since
        others share the pipe.
        """
        if peer == self._host.peer_id:
            self._hand_over(peer, message, body, 0)
            await trio.lowlevel.checkpoint()  # our stage starts to compute before the sender goes on
            return
        pipe = self._pipe(peer)
        if pipe.idle:
            pipe.use()
        await self._send(pipe, message, body)

    def _pipe(self, peer: PeerId) -> _Pipe:
        pipe = self._pipes.get(peer)
        if pipe is None:
            pipe = self._pipes[peer] = _Pipe(peer)
        return pipe

    async def _send(self, pipe: _Pipe, message: Message, body: bytes = b"") -> None:
        lock = pipe.lock
        try:
            lock.acquire_nowait()  # a free lock must not cost a round of the event loop on every token
        except trio.WouldBlock:
            await lock.acquire()
        try:
            await self._write(pipe, pipe.stream or await self._open(pipe), message, body)
        finally:
            lock.release()

    async def _open(self, pipe: _Pipe) -> Stream:
        stream = pipe.stream = await self._host.open_stream(pipe.peer, PROTOCOL, Lane.TOKEN)
        await self._write(pipe, stream, self._next_ping())
        self._tasks.start_soon(self._compare_clocks, pipe, stream)
        return stream

    def _next_ping(self) -> Ping:
        self.pings += 1
        return Ping(number=self.pings, sent_us=now_us())

    async def _compare_clocks(self, pipe: _Pipe, stream: Stream) -> None:
        """Ping while the pipe is open: at once when messages begin to flow, then every second, then ever more seldom.

        So the receipts of a session tell its delays, a session that waits hears of a broken pipe, and an idle mesh
        costs next to nothing.
        """
        while True:
            for pause in FIRST_PINGS:
                await trio.sleep(pause)
                if not await self._ping(pipe, stream):
                    return
            pause = PING_S
            woken = False
            while not woken:
                pipe.idle, pipe.used = True, trio.Event()
                if pause == PING_S:
                    await trio.sleep(pause)
                else:
                    with trio.move_on_after(pause):
                        await pipe.used.wait()
                        woken = True
                if not await self._ping(pipe, stream):
                    return
                pause = min(LONGEST_PING_S, 2 * pause) if pipe.idle else PING_S

    async def _ping(self, pipe: _Pipe, stream: Stream) -> bool:
        """Whether it could be sent over this stream."""
        async with pipe.lock:
            if pipe.stream is not stream:
                return False
            try:
                await self._write(pipe, stream, self._next_ping())
            except PeerUnreachable as error:
                _log.debug("ping.unsent", peer=short(pipe.peer), reason=str(error))
                return False
        return True

    async def _write(self, pipe: _Pipe, stream: Stream, message: Message, body: bytes = b"") -> None:
        if isinstance(message, Step | Token):
            message = dataclasses.replace(message, sent_us=now_us())
        data = memoryview(pack(PIPE.encode(message), body))
        sent, why = 0, "the pipe broke"
        try:
            while sent < len(data):
                piece = data[sent : sent + PIECE_BYTES]
                with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_S) as scope:
                    await stream.send_all(piece)
                if scope.cancelled_caught:
                    raise PeerUnreachable(
                        f"{pipe.peer} took no data for {SEND_S:.0f} s; its pipe is closed", peer=pipe.peer
                    )
                sent += len(piece)
        except PeerUnreachable as error:
            why = str(error)
            raise
        finally:
            if sent < len(data) and pipe.stream is stream:
                self._lost(pipe.peer, why)
                await self._close(pipe)

    async def _close(self, pipe: _Pipe) -> None:
        stream, pipe.stream = pipe.stream, None
        if stream is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.reset()

    def _lost(self, peer: PeerId, reason: str) -> None:
        for listener in self._listeners:
            listener(peer, reason)

    def _hand_over(self, peer: PeerId, message: Message, body: bytes, network_us: int) -> None:
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(peer, message, body, network_us)

    async def _serve(self, stream: Stream) -> None:
        """Read one neighbour's pipe until it ends."""
        peer = stream.peer
        pipe = self._pipe(peer)
        reader = FrameReader()
        while data := await stream.receive_some(READ_BYTES):
            received_us = now_us()
            for frame in reader.feed(data):
                message = PIPE.decode(frame.header)
                await self._slow_down(peer, COSTS.get(type(message), 1.0))
                if isinstance(message, Ping):
                    self._answer_soon(pipe, message, received_us)
                elif isinstance(message, Pong):
                    pipe.clock.add(message, received_us)
                else:
                    if pipe.idle:
                        pipe.use()
                    sent_us = message.sent_us if isinstance(message, Step | Token) else received_us
                    self._hand_over(peer, message, frame.body, pipe.clock.under_way_us(sent_us, received_us))
        if reader.pending:
            raise RemoteProtocolError(f"the pipe of {peer} was cut off inside a frame")

    async def _slow_down(self, peer: PeerId, cost: float) -> None:
        """Leave what a peer sends beyond its allowance in its own buffers for a while."""
        now = trio.current_time()
        wait_s = self._allowances.of(peer, now).spend(cost, now, SLOW_S)
        if wait_s:
            self.flooded(peer)
            await trio.sleep(wait_s)

    def _answer_soon(self, pipe: _Pipe, ping: Ping, received_us: int) -> None:
        """Answer from a task of its own; while one answer waits for its pipe, further pings get none."""
        if not pipe.answering:
            pipe.answering = True
            self._tasks.start_soon(self._answer, pipe, ping, received_us)

    async def _answer(self, pipe: _Pipe, ping: Ping, received_us: int) -> None:
        pong = Pong(number=ping.number, ping_sent_us=ping.sent_us, received_us=received_us, sent_us=now_us())
        try:
            await self._send(pipe, pong)
        except (PeerUnreachable, Declined) as error:
            _log.debug("pong.unsent", peer=short(pipe.peer), reason=str(error))
        finally:
            pipe.answering = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare clocks over open pipes, and close those of peers that went away, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, self._host.events())
            await self._tasks.run(task_status=task_status)

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        """A pipe does not outlive its connection: the peer that comes back knows nothing of it."""
        async with events:
            async for event in events:
                if not event.connected:
                    pipe = self._pipe(event.peer)
                    pipe.clock = ClockOffset()  # it may come back with another clock: a process has its own
                    self._lost(event.peer, event.reason)
                    await self._close(pipe)
