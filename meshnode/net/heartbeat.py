"""Whether a connected peer still lives, and how far away it is.

A killed process closes its sockets; one that is stopped, or a machine that lost its cable, closes nothing. So
whoever has heard nothing for a second sends a number over a long-lived stream, which the other one returns. Any bytes
from the peer count as life, its numbers too, so that two idle peers take turns and a long transfer is no reason to
doubt; only our own measure of time that we were really awake counts as silence, so that an event loop that was held
up for a while accuses nobody.

Not everybody watches everybody so closely, which would cost a large mesh more than all else: in a ring of all whom a
host is connected to, it watches its two neighbours, and the others calmly until something is in doubt (`follow`).

A guest does not know our protocol; it is asked by libp2p's ping, which returns bytes in the same way, and given
more time: it may be a large daemon that is busy with others.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net.port import Stream
from protocols.bucket import Buckets

PROTOCOL: Final = "/meshnode/heartbeat/1"
LATE_S: Final = 0.25  # a sleep that ends later than this means that we were held up, not the peer
KEPT_S: Final = 60.0
FEW_TRIPS: Final = 3  # below, every second is measured
FIRST_S: Final = 1.0
MAX_UNANSWERED: Final = 60
BEATS_PER_S: Final = 10.0  # returned to one peer, over all its streams; ours ask once a second
BEAT_BURST: Final = 100.0
BEAT_WAIT_S: Final = 10.0  # the longest pause of one stream
MOVE: Final = 0.3
MOVE_US: Final = 500


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often a peer is asked, and how long it may say nothing."""

    beat_bytes: int  # sent, and coming back
    period_s: float  # without a byte from the peer, until it is asked
    measure_s: float  # the round trip is measured so often, however much the peer says
    silence_s: float  # without a byte, until it is given up


MEMBER: Final = Rhythm(beat_bytes=8, period_s=1.0, measure_s=5.0, silence_s=4.0)
CALM: Final = Rhythm(beat_bytes=8, period_s=8.0, measure_s=8.0, silence_s=20.0)
# 32 bytes: github.com/libp2p/specs/blob/master/ping/ping.md
GUEST: Final = Rhythm(beat_bytes=32, period_s=5.0, measure_s=5.0, silence_s=15.0)


class Watched(Protocol):
    """The peer, as its host sees it."""

    async def open_stream(self) -> Stream:
        """A stream on which every byte comes back. Raises PeerUnreachable, Declined (it does not admit us yet)."""

    def heard_at(self) -> float:
        """When the last bytes of any kind came from it (`trio.current_time`)."""

    def agreed(self) -> None:
        """It has agreed to the heartbeat, which it does once it admits us."""

    def moved(self) -> None:
        """Its round trip was measured for the first time, or has moved by `MOVE` and `MOVE_US`."""


class Answers:
    """The serving side of the protocol."""

    def __init__(self) -> None:
        self._beats = Buckets(BEATS_PER_S, BEAT_BURST)

    async def answer(self, stream: Stream) -> None:
        """Return every byte, no faster than a peer has reason to ask."""
        while data := await stream.receive_some(MEMBER.beat_bytes):
            await stream.send_all(data)
            now = trio.current_time()
            await trio.sleep(self._beats.of(stream.peer, now).spend(1.0, now, BEAT_WAIT_S))


class Heartbeat:
    """Watches one connected peer."""

    def __init__(self, peer: Watched, rhythm: Rhythm = MEMBER) -> None:
        self._peer = peer
        self._rhythm = rhythm
        self._trips: deque[tuple[float, int]] = deque()  # (when, microseconds)
        self._sent: dict[int, float] = {}
        self._sent_at = -math.inf
        self._told_us: int | None = None
        self._waits = False  # something was sent that the peer has to answer
        self._changed = trio.Event()  # the rhythm has

    def follow(self, rhythm: Rhythm) -> None:
        """Ask in another rhythm from now on. A closer one begins by asking, and silence counts anew."""
        if rhythm != self._rhythm:
            self._rhythm = rhythm
            self._changed.set()
            self._changed = trio.Event()

    @property
    def lost(self) -> str:
        """Why the peer is given up after the silence."""
        return f"no heartbeat for {self._rhythm.silence_s:.0f} s"

    @property
    def round_trip_us(self) -> int | None:
        """The median of the last minute, in microseconds."""
        since = trio.current_time() - KEPT_S
        trips = [trip for when, trip in self._trips if when >= since]
        return round(statistics.median(trips)) if trips else None

    async def watch(self) -> None:
        """Return when the peer has been silent for too long."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat_forever)
            silence, heard, before = 0.0, self._peer.heard_at(), trio.current_time()
            while silence < self._rhythm.silence_s:
                left, period = self._rhythm.silence_s - silence, self._rhythm.period_s
                tick = left - period if left > 2 * period else min(period, left)  # a closer look towards the end
                changed = self._changed
                with trio.move_on_after(tick):
                    await changed.wait()
                now, last = trio.current_time(), self._peer.heard_at()
                awake = min(now - before, tick + LATE_S)
                if not self._waits or changed.is_set():
                    silence = 0.0
                elif last != heard:
                    silence = min(now - last, awake)
                else:
                    silence += awake
                heard, before = last, now
            nursery.cancel_scope.cancel()

    async def _beat_forever(self) -> None:
        while True:
            self._waits = True
            try:
                stream = await self._peer.open_stream()
            except Declined:
                self._waits = False  # it lives, but does not admit us yet
            except PeerUnreachable:
                pass  # the silence is being counted
            else:
                self._peer.agreed()
                await self._beat(stream)
            await trio.sleep(self._rhythm.period_s)

    async def _beat(self, stream: Stream) -> None:
        """Send numbers until the stream ends."""
        self._sent.clear()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_answers, stream, nursery.cancel_scope)
                for number in itertools.count(1):
                    self._sent_at = self._sent[number] = trio.current_time()
                    self._sent.pop(number - MAX_UNANSWERED, None)
                    try:
                        await stream.send_all(number.to_bytes(self._rhythm.beat_bytes, "big"))
                    except PeerUnreachable:
                        break
                    await self._wait_due()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    async def _wait_due(self) -> None:
        """Until the next number is to be sent."""
        due = self._sent_at + min(FIRST_S, self._rhythm.period_s)
        while trio.current_time() < due:
            changed = self._changed
            with trio.move_on_at(due):
                await changed.wait()
            if len(self._trips) >= FEW_TRIPS:
                quiet = self._peer.heard_at() + self._rhythm.period_s
                due = min(quiet, self._sent_at + self._rhythm.measure_s)

    async def _read_answers(self, stream: Stream, scope: trio.CancelScope) -> None:
        buffer = b""
        try:
            while data := await stream.receive_some(4096):
                buffer += data
                while len(buffer) >= self._rhythm.beat_bytes:
                    beat, buffer = buffer[: self._rhythm.beat_bytes], buffer[self._rhythm.beat_bytes :]
                    self._note(int.from_bytes(beat, "big"))
        except PeerUnreachable:
            pass
        scope.cancel()

    def _note(self, number: int) -> None:
        sent = self._sent.pop(number, None)
        now = trio.current_time()
        if sent is not None:
            self._trips.append((now, round((now - sent) * 1_000_000)))
        while self._trips and self._trips[0][0] < now - KEPT_S:
            self._trips.popleft()
        us, told = self.round_trip_us, self._told_us
        if us is not None and (told is None or abs(us - told) > MOVE * told + MOVE_US):
            self._told_us = us
            self._peer.moved()
