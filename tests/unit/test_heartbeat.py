"""The heartbeat of one peer, in virtual time."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined
from meshnode.net.heartbeat import FEW_TRIPS, MEMBER, Heartbeat
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
