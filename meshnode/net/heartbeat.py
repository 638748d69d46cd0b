"""Whether a connected peer still lives, and how far away it is.

A killed process closes its sockets; one that is stopped, or a machine that lost its cable, closes nothing. So each
side sends a number every second over a long-lived stream and the other one returns it. Any bytes from the peer
count as life, so that a long transfer is no reason to doubt it; only our own measure of time that we were really
awake counts as silence, so that an event loop that was held up for a while accuses nobody.

A guest does not know our protocol; it is asked by libp2p's ping, which returns bytes in the same way, and given
more time: it may be a large daemon that is busy with others.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net.port import Stream

PROTOCOL: Final = "/meshnode/heartbeat/1"
PERIOD_SECONDS: Final = 1.0
SILENCE_SECONDS: Final = 4.0
TICK_SECONDS: Final = 0.25
MAX_TICK_SECONDS: Final = 0.5  # a longer tick means that we were held up, not the peer
KEPT_SECONDS: Final = 60.0
BEAT_BYTES: Final = 8
MAX_UNANSWERED: Final = 60
MOVE: Final = 0.3
MOVE_US: Final = 500
PING_BYTES: Final = 32  # github.com/libp2p/specs/blob/master/ping/ping.md
GUEST_PERIOD_SECONDS: Final = 5.0
GUEST_SILENCE_SECONDS: Final = 15.0


async def answer(stream: Stream) -> None:
    """Return every byte; the serving side of the protocol."""
    while data := await stream.receive_some(BEAT_BYTES):
        await stream.send_all(data)


class Heartbeat:
    """Watches one connected peer.

    Args:
      open_stream: opens a stream of `PROTOCOL` to the peer.
      heard_at: when the last bytes of any kind came from the peer (`trio.current_time`).
      on_answer: called when the peer has agreed to the heartbeat, which it does once it admits us.
      on_moved: called when the round trip is first measured, and when it has moved by `MOVE` and `MOVE_US`.
      beat_bytes: what is sent and comes back each time.
      period, silence: seconds between beats, and without a byte until the peer is given up.
    """

    def __init__(
        self,
        open_stream: Callable[[], Awaitable[Stream]],
        heard_at: Callable[[], float],
        on_answer: Callable[[], None],
        *,
        on_moved: Callable[[], None] = lambda: None,
        beat_bytes: int = BEAT_BYTES,
        period: float = PERIOD_SECONDS,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self._open_stream = open_stream
        self._heard_at = heard_at
        self._on_answer = on_answer
        self._on_moved = on_moved
        self._told_us: int | None = None
        self._beat_bytes = beat_bytes
        self._period = period
        self._silence = silence
        self._trips: deque[tuple[float, int]] = deque()  # (when, microseconds)
        self._sent: dict[int, float] = {}
        self._waits = False  # something was sent that the peer has to answer

    @property
    def lost(self) -> str:
        """Why the peer is given up after the silence."""
        return f"no heartbeat for {self._silence:.0f} s"

    @property
    def round_trip_us(self) -> int | None:
        """The median of the last minute, in microseconds."""
        since = trio.current_time() - KEPT_SECONDS
        trips = [trip for when, trip in self._trips if when >= since]
        return round(statistics.median(trips)) if trips else None

    async def watch(self) -> None:
        """Return when the peer has been silent for too long."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat_forever)
            silence, heard = 0.0, self._heard_at()
            before = trio.current_time()
            while silence < self._silence:
                await trio.sleep(TICK_SECONDS)
                now = trio.current_time()
                if self._heard_at() != heard or not self._waits:
                    silence, heard = 0.0, self._heard_at()
                else:
                    silence += min(now - before, MAX_TICK_SECONDS)
                before = now
            nursery.cancel_scope.cancel()

    async def _beat_forever(self) -> None:
        while True:
            self._waits = True
            try:
                stream = await self._open_stream()
            except Declined:
                self._waits = False  # it lives, but does not admit us yet
            except PeerUnreachable:
                pass  # the silence is being counted
            else:
                self._on_answer()
                await self._beat(stream)
            await trio.sleep(self._period)

    async def _beat(self, stream: Stream) -> None:
        """Send numbers until the stream ends."""
        self._sent.clear()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_answers, stream, nursery.cancel_scope)
                for number in itertools.count(1):
                    self._sent[number] = trio.current_time()
                    self._sent.pop(number - MAX_UNANSWERED, None)
                    try:
                        await stream.send_all(number.to_bytes(self._beat_bytes, "big"))
                    except PeerUnreachable:
                        break
                    await trio.sleep(self._period)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    async def _read_answers(self, stream: Stream, scope: trio.CancelScope) -> None:
        buffer = b""
        try:
            while data := await stream.receive_some(4096):
                buffer += data
                while len(buffer) >= self._beat_bytes:
                    beat, buffer = buffer[: self._beat_bytes], buffer[self._beat_bytes :]
                    self._note(int.from_bytes(beat, "big"))
        except PeerUnreachable:
            pass
        scope.cancel()

    def _note(self, number: int) -> None:
        sent = self._sent.pop(number, None)
        now = trio.current_time()
        if sent is not None:
            self._trips.append((now, round((now - sent) * 1_000_000)))
        while self._trips and self._trips[0][0] < now - KEPT_SECONDS:
            self._trips.popleft()
        us, told = self.round_trip_us, self._told_us
        if us is not None and (told is None or abs(us - told) > MOVE * told + MOVE_US):
            self._told_us = us
            self._on_moved()
