"""The heartbeat of one peer, in virtual time."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined
from meshnode.net.heartbeat import BEAT_BURST, BEATS_PER_S, CALM, FEW_TRIPS, MEMBER, Answers, Heartbeat
from protocols.ids import PeerId


class Peer:
    """Returns what it gets after `delay_s`, as long as it lives."""

    peer = PeerId("peer")

    def __init__(self, *, delay_s: float = 0.05, admits: bool = True) -> None:
        self.delay_s = delay_s
        self.admits = admits
        self.lives = True
        self.heard = 0.0
        self.beats: list[float] = []
        self._answers, self._to_us = trio.open_memory_channel[bytes](math.inf)

    async def open_stream(self) -> Peer:
        if not self.admits:
            raise Declined("forbidden", "it does not know us")
        return self

    def heard_at(self) -> float:
        return self.heard

    def agreed(self) -> None: ...

    def moved(self) -> None: ...

    async def send_all(self, data: bytes | memoryview) -> None:
        self.beats.append(trio.current_time())
        if self.lives:
            self._answers.send_nowait(bytes(data))

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        data = await self._to_us.receive()
        await trio.sleep(self.delay_s)
        self.heard = trio.current_time()
        return data

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    async def reset(self) -> None: ...


@asynccontextmanager
async def watched(peer: Peer) -> AsyncIterator[tuple[Heartbeat, trio.Event]]:
    beat, lost = Heartbeat(peer), trio.Event()

    async def watch() -> None:
        await beat.watch()
        lost.set()

    peer.heard = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        yield beat, lost
        nursery.cancel_scope.cancel()


async def test_a_peer_that_answers_is_never_lost_and_its_round_trip_is_known(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with watched(Peer(delay_s=0.05)) as (beat, lost):
        await trio.sleep(600)
        assert not lost.is_set()
        assert beat.round_trip_us == pytest.approx(50_000)


async def test_a_peer_that_falls_silent_is_lost_in_four_s(autojump_clock: MockClock) -> None:
    peer = Peer()
    async with watched(peer) as (_, lost):
        await trio.sleep(33.3)
        peer.lives = False
        with trio.fail_after(MEMBER.silence_s + MEMBER.period_s):
            await lost.wait()
        assert trio.current_time() - peer.heard == pytest.approx(MEMBER.silence_s)


async def test_a_peer_that_says_enough_is_asked_for_its_round_trip_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    peer = Peer()
    async with watched(peer) as (beat, lost):
        for _ in range(1200):
            await trio.sleep(0.5)
            peer.heard = trio.current_time()
        assert not lost.is_set()
        assert len(peer.beats) == pytest.approx(600 / MEMBER.measure_s, abs=FEW_TRIPS + 1)
        assert beat.round_trip_us == pytest.approx(50_000)


async def test_a_peer_that_does_not_admit_us_is_not_silent(autojump_clock: MockClock) -> None:
    async with watched(Peer(admits=False)) as (_, lost):
        await trio.sleep(100)
        assert not lost.is_set()


async def test_an_event_loop_that_was_held_up_accuses_nobody(autojump_clock: MockClock) -> None:
    """Nothing ran for a minute: neither the peer's answers were read, nor is the minute its silence."""
    peer = Peer(delay_s=0.2)
    async with watched(peer) as (_, lost):
        await trio.sleep(20)
        autojump_clock.jump(60)
        await trio.sleep(20)
        assert not lost.is_set()


async def test_a_calm_watch_asks_rarely_and_a_doubt_makes_it_close(autojump_clock: MockClock) -> None:
    peer = Peer()
    async with watched(peer) as (beat, lost):
        await trio.sleep(10)
        beat.follow(CALM)
        before = len(peer.beats)
        await trio.sleep(80)
        assert len(peer.beats) - before <= 80 / CALM.period_s + 1
        peer.lives = False
        began = trio.current_time()
        await trio.sleep(CALM.period_s)
        assert not lost.is_set()
        beat.follow(MEMBER)
        began = trio.current_time()
        await lost.wait()
        assert trio.current_time() - began <= MEMBER.silence_s + 0.1


async def test_a_doubt_about_a_peer_that_lives_does_it_no_harm(autojump_clock: MockClock) -> None:
    """It has said nothing for a while, since nobody has asked."""
    peer = Peer()
    async with watched(peer) as (beat, lost):
        await trio.sleep(10)
        beat.follow(CALM)
        await trio.sleep(CALM.period_s * 3.9)
        beat.follow(MEMBER)
        await trio.sleep(30)
        assert not lost.is_set()


async def test_a_calm_watch_notices_a_dead_peer(autojump_clock: MockClock) -> None:
    peer = Peer()
    async with watched(peer) as (beat, lost):
        await trio.sleep(10)
        beat.follow(CALM)
        await trio.sleep(40)
        peer.lives = False
        began = trio.current_time()
        await lost.wait()
        assert trio.current_time() - began <= CALM.silence_s + 0.5


async def test_nobody_gets_beats_back_faster_than_he_needs_them(autojump_clock: MockClock) -> None:
    class Flood:
        peer = PeerId("flood")

        def __init__(self, beats: int) -> None:
            self.left, self.returned = beats, 0

        async def receive_some(self, max_bytes: int = 65536) -> bytes:
            self.left -= 1
            return bytes(max_bytes) if self.left >= 0 else b""

        async def send_all(self, data: bytes) -> None:
            self.returned += 1

    answers, more = Answers(), 200
    streams = [Flood(round(BEAT_BURST) // 2 + more // 2) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(answers.answer, stream)
    assert sum(stream.returned for stream in streams) == BEAT_BURST + more
    assert more / BEATS_PER_S * 0.9 < trio.current_time() < more / BEATS_PER_S * 1.2, "two streams are no faster"
