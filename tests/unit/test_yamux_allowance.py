"""A peer that sends more frames than anybody needs is read more slowly: one Yamux session over a wire in memory."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from meshnode.net.connection_limits import (
    FRAME_BURST,
    FRAMES_PER_S,
    MEMBER_STREAM_FRAMES,
    SLOW_S,
    SLOWED_STREAMS,
    WASTE_BYTES,
    Allowances,
)
from meshnode.net.heartbeat import MEMBER
from meshnode.net.libp2p.yamux import Flag, FrameType, YamuxSession
from protocols.ids import PeerId

PEER = PeerId("peer")
AT_ONCE = round(FRAME_BURST / MEMBER_STREAM_FRAMES)  # streams
PER_S = FRAMES_PER_S / MEMBER_STREAM_FRAMES


def frame(kind: FrameType, flags: Flag, number: int, length: int = 0) -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, number, length)


def opened_and_reset(number: int) -> bytes:
    return frame(FrameType.WINDOW_UPDATE, Flag.SYN, number) + frame(FrameType.WINDOW_UPDATE, Flag.RST, number)


class Wire:
    """Gives what a peer has sent, one record after the other."""

    def __init__(self) -> None:
        self.send, self._records = trio.open_memory_channel[bytes](10_000)
        self.read_at: list[float] = []
        self.was_read = trio.Event()

    async def read(self) -> bytes:
        try:
            data = await self._records.receive()
        except trio.EndOfChannel:
            return b""
        self.read_at.append(trio.current_time())
        self.was_read.set()
        self.was_read = trio.Event()
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def close_write(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def session(allowances: Allowances) -> AsyncIterator[tuple[YamuxSession, Wire, list[float]]]:
    """One that runs, its wire, and when its peer was found to be too fast."""
    wire, slowed = Wire(), list[float]()
    one = YamuxSession(PEER, wire, initiator=False)
    one.allowance = allowances.of(PEER)
    one.stream_frames = MEMBER_STREAM_FRAMES
    one.on_slowed = lambda: slowed.append(trio.current_time())

    async def accept() -> None:
        while True:
            await one.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        nursery.start_soon(accept)
        try:
            yield one, wire, slowed
        finally:
            nursery.cancel_scope.cancel()


async def all_read(wire: Wire, count: int) -> float:
    """Until so many records were read; how long that took."""
    began = trio.current_time()
    with trio.fail_after(3600):
        while len(wire.read_at) < count:
            await wire.was_read.wait()
    return trio.current_time() - began


async def test_as_many_streams_at_once_as_anybody_needs_cost_no_time(autojump_clock: MockClock) -> None:
    async with session(Allowances()) as (_, wire, slowed):
        for number in range(AT_ONCE - 1):
            wire.send.send_nowait(opened_and_reset(2 * number + 1))
        assert await all_read(wire, AT_ONCE - 1) < 0.1
        assert not slowed


async def test_a_flood_of_streams_is_read_at_the_rate_and_its_peer_is_told_of(autojump_clock: MockClock) -> None:
    more = 100
    async with session(Allowances()) as (one, wire, slowed):
        for number in range(AT_ONCE + more):
            wire.send.send_nowait(opened_and_reset(2 * number + 1))
        took = await all_read(wire, AT_ONCE + more)
        assert more / PER_S * 0.9 < took < more / PER_S * 1.2
        assert slowed
        assert not one.ended, "its connection lives, and so do its other streams"
        pauses = [later - before for before, later in zip(wire.read_at, wire.read_at[1:], strict=False)]
        assert max(pauses) < MEMBER.silence_s, "nobody takes it for dead meanwhile"
        await trio.sleep(10)
        slowed.clear()
        for number in range(AT_ONCE + more, AT_ONCE + more + 50):
            wire.send.send_nowait(opened_and_reset(2 * number + 1))
        assert await all_read(wire, AT_ONCE + more + 50) < 0.1, "what it did is over when it has ceased"
        assert not slowed


async def test_a_new_connection_gives_no_new_allowance(autojump_clock: MockClock) -> None:
    allowances = Allowances()
    async with session(allowances) as (_, wire, _slowed):
        for number in range(AT_ONCE):
            wire.send.send_nowait(opened_and_reset(2 * number + 1))
        await all_read(wire, AT_ONCE)
    async with session(allowances) as (_, wire, slowed):
        for number in range(40):
            wire.send.send_nowait(opened_and_reset(2 * number + 1))
        assert await all_read(wire, 40) > 20 / PER_S
        assert slowed


@pytest.mark.parametrize(
    ("piece", "frames"),
    [
        (frame(FrameType.PING, Flag.SYN, 0) * 1000, 1000),
        (frame(FrameType.WINDOW_UPDATE, Flag.NONE, 99) * 1000, 1000),
        (frame(FrameType.DATA, Flag.NONE, 99, 100 * WASTE_BYTES) + bytes(100 * WASTE_BYTES), 101),
        (frame(FrameType.DATA, Flag.SYN | Flag.RST, 99) * 3, 3 * MEMBER_STREAM_FRAMES + 3),
    ],
    ids=["pings", "windows of no stream", "bytes of no stream", "streams in data frames"],
)
async def test_nothing_that_a_peer_sends_in_vain_is_free(
    autojump_clock: MockClock, piece: bytes, frames: float
) -> None:
    count = round(2 * FRAME_BURST / frames)
    async with session(Allowances()) as (one, wire, slowed):
        for _ in range(count):
            wire.send.send_nowait(piece)
        took = await all_read(wire, count)
        assert took > 0.8 * (count * frames - FRAME_BURST) / FRAMES_PER_S
        assert slowed
        assert not one.ended


async def test_bytes_that_somebody_reads_cost_no_time(autojump_clock: MockClock) -> None:
    size = 1 << 16
    async with session(Allowances()) as (one, wire, slowed):
        wire.send.send_nowait(frame(FrameType.WINDOW_UPDATE, Flag.SYN, 1))
        await all_read(wire, 1)
        stream = one._streams[1]
        for _ in range(2000):  # 128 MB
            wire.send.send_nowait(frame(FrameType.DATA, Flag.NONE, 1, size) + bytes(size))
            left = size
            while left:
                left -= len(await stream.receive_some(left))
        assert not slowed


async def test_one_record_full_of_streams_is_paid_for_in_a_pause_that_ends(autojump_clock: MockClock) -> None:
    async with session(Allowances()) as (one, wire, slowed):
        one.max_streams = 1
        for _ in range(3):
            wire.send.send_nowait(b"".join(frame(FrameType.WINDOW_UPDATE, Flag.SYN, 2 * n + 1) for n in range(1000)))
            wire.send.send_nowait(b"".join(frame(FrameType.WINDOW_UPDATE, Flag.RST, 2 * n + 1) for n in range(1000)))
        assert 2 * SLOW_S <= await all_read(wire, 6) <= 6 * SLOW_S
        assert slowed


async def test_of_a_peer_that_is_read_more_slowly_few_streams_at_once_are_taken(autojump_clock: MockClock) -> None:
    async with session(Allowances()) as (one, wire, _):
        wire.send.send_nowait(opened_and_reset(1) * 1)
        wire.send.send_nowait(frame(FrameType.PING, Flag.NONE, 0) * round(FRAME_BURST + FRAMES_PER_S))
        await all_read(wire, 2)
        wire.send.send_nowait(b"".join(frame(FrameType.WINDOW_UPDATE, Flag.SYN, 2 * n + 1) for n in range(1, 101)))
        await all_read(wire, 3)
        assert 0 < one.stream_count <= SLOWED_STREAMS
        await trio.sleep(60)
        wire.send.send_nowait(b"".join(frame(FrameType.WINDOW_UPDATE, Flag.SYN, 2 * n + 1) for n in range(101, 151)))
        await all_read(wire, 4)
        assert one.stream_count >= 50, "an honest peer has them all"
