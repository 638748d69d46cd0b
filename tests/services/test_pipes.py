"""Pipes between nodes on the in-memory network, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import PeerUnreachable
from meshnode.net.pipes import (
    COSTS,
    MESSAGE_BURST,
    MESSAGES_PER_S,
    MOST_UNDER_WAY_US,
    PROTOCOL,
    SEND_S,
    ClockOffset,
    Pipes,
)
from meshnode.net.port import Stream
from meshnode.sim.network import MemoryHost, MemoryNetwork
from protocols.frame import pack
from protocols.ids import PeerId
from protocols.pipe.messages import PIPE, Close, Hop, HopTime, Message, Open, Pong, Step
from tests.adverts import MANIFEST, peer_of

S = bytes(16)
CLOSE = Close(session=S, attempt=0)
STEP = Step(session=S, attempt=0, position=0, rows=1, sample=False, sent_us=0)


@dataclass
class Node:
    host: MemoryHost
    pipes: Pipes
    heard: list[tuple[PeerId, Message, bytes, int]] = field(default_factory=list)
    lost: list[tuple[PeerId, str]] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)
    broken: bool = False

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    def __post_init__(self) -> None:
        self.pipes.handle(Close, self.take)
        self.pipes.handle(Step, self.take)
        self.pipes.on_lost(self.lose)

    def take(self, peer: PeerId, message: Message, body: bytes, network_us: int) -> None:
        if self.broken:
            raise PeerUnreachable("this receiver has had enough")
        self.heard.append((peer, message, body, network_us))
        self._tell()

    def lose(self, peer: PeerId, reason: str) -> None:
        self.lost.append((peer, reason))
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = trio.Event()

    async def until(self, condition: Callable[[], object], within: float) -> None:
        with trio.fail_after(within):
            while not condition():
                await self.news.wait()


@asynccontextmanager
async def pair(*, delay: float = 0.001, bandwidth: float = 0.0) -> AsyncIterator[tuple[Node, Node, MemoryNetwork]]:
    """Two connected nodes with running pipes."""
    network = MemoryNetwork()
    hosts = [network.host(peer_of(number)) for number in (1, 2)]
    network.set_link(hosts[0].peer_id, hosts[1].peer_id, delay=delay, bandwidth=bandwidth)
    one, other = (Node(host, Pipes(host)) for host in hosts)
    async with trio.open_nursery() as nursery:
        for node in (one, other):
            await nursery.start(node.host.run)
            await nursery.start(node.pipes.run)
        one.host.admit(other.peer, True)
        other.host.admit(one.peer, True)
        await one.host.connect(other.peer, other.host.addresses)
        yield one, other, network
        nursery.cancel_scope.cancel()


async def test_messages_arrive_in_order_and_to_oneself(autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        for number in range(20):
            await one.pipes.send(other.peer, Close(session=S, attempt=number), bytes([number]))
        await other.until(lambda: len(other.heard) == 20, 5)
        assert [(m.attempt, body) for _, m, body, _ in other.heard if isinstance(m, Close)] == [
            (number, bytes([number])) for number in range(20)
        ]
        await one.pipes.send(one.peer, CLOSE)
        assert one.heard == [(one.peer, CLOSE, b"", 0)]


async def test_who_sends_more_than_anybody_answers_is_read_more_slowly_and_named(autojump_clock: MockClock) -> None:
    more = 2000
    async with pair() as (one, other, _):
        slow: list[PeerId] = []
        other.pipes.flooded = slow.append
        began = trio.current_time()
        for _ in range(round(MESSAGE_BURST) - 100):
            await one.pipes.send(other.peer, STEP)
        await other.until(lambda: len(other.heard) >= MESSAGE_BURST - 100, 5)
        assert trio.current_time() - began < 1
        assert not slow, "a burst is no flood"
        for _ in range(100 + more):
            await one.pipes.send(other.peer, STEP)
        await other.until(lambda: len(other.heard) >= MESSAGE_BURST + more, 60)
        assert trio.current_time() - began > 0.9 * more / MESSAGES_PER_S
        assert set(slow) == {one.peer}
        await other.pipes.send(one.peer, STEP)
        await one.until(lambda: one.heard, 1)


async def test_an_opening_counts_as_many_steps(autojump_clock: MockClock) -> None:
    more = 50
    async with pair() as (one, other, _):
        other.pipes.handle(Open, other.take)
        began = trio.current_time()
        opening = Open(
            session=S,
            attempt=0,
            origin=one.peer,
            manifest=MANIFEST,
            variant="int4",
            route=(Hop(peer=other.peer, first=0, last=3, incarnation=1),),
            index=0,
            capacity=9,
            sampling=None,
        )
        count = round(MESSAGE_BURST / COSTS[Open]) + more
        for _ in range(count):
            await one.pipes.send(other.peer, opening)
        await other.until(lambda: len(other.heard) == count, 60)
        assert trio.current_time() - began > 0.8 * more * COSTS[Open] / MESSAGES_PER_S


async def test_a_large_frame_over_a_slow_link_takes_its_time(autojump_clock: MockClock) -> None:
    async with pair(bandwidth=100_000) as (one, other, _):
        began = trio.current_time()
        await one.pipes.send(other.peer, STEP, bytes(4_000_000))
        await other.until(lambda: other.heard, 100)
        assert trio.current_time() - began > 3 * SEND_S
        assert one.lost == []


async def test_large_frames_both_ways_do_not_wait_for_each_other(autojump_clock: MockClock) -> None:
    async with pair(bandwidth=400_000) as (one, other, _), trio.open_nursery() as nursery:
        for sender, receiver in ((one, other), (other, one)):
            for _ in range(4):
                nursery.start_soon(sender.pipes.send, receiver.peer, STEP, bytes(4_000_000))
        for node in (one, other):
            await node.until(lambda node=node: len(node.heard) == 4, 200)  # type: ignore[misc]
        assert one.lost == other.lost == []


async def test_a_reader_that_takes_nothing_breaks_the_pipe(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def sleep(_: Stream) -> None:
        await trio.sleep_forever()

    async with pair() as (one, _, network):
        deaf = network.host(peer_of(3))
        deaf.handle(PROTOCOL, sleep)
        await nursery.start(deaf.run)
        one.host.admit(deaf.peer_id, True)
        deaf.admit(one.peer, True)
        await one.host.connect(deaf.peer_id, deaf.addresses)
        with pytest.raises(PeerUnreachable, match="took no data for 10 s") as caught:
            await one.pipes.send(deaf.peer_id, STEP, bytes(4_000_000))
        assert caught.value.peer == deaf.peer_id
        assert [peer for peer, _ in one.lost] == [deaf.peer_id]


async def test_a_pipe_is_opened_anew_after_the_peer_came_back(autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        await one.pipes.send(other.peer, CLOSE)
        await other.until(lambda: other.heard, 5)
        events = one.host.events()
        await one.host.disconnect(other.peer, "a pause")
        while (await events.receive()).connected:
            pass
        assert one.pipes.clock_of(other.peer).compared == 0, "another process may come back"
        with pytest.raises(PeerUnreachable):
            await one.pipes.send(other.peer, CLOSE)
        await one.host.connect(other.peer, other.host.addresses)
        await one.pipes.send(other.peer, CLOSE)
        await other.until(lambda: len(other.heard) == 2, 5)


async def test_the_first_message_after_a_reconnection_is_not_lost(autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        await one.pipes.send(other.peer, CLOSE)
        await other.until(lambda: other.heard, 5)
        await one.host.disconnect(other.peer, "a pause")
        await one.host.connect(other.peer, other.host.addresses)
        await one.pipes.send(other.peer, CLOSE)
        await other.until(lambda: len(other.heard) == 2, 5)


@pytest.mark.parametrize(
    "nonsense",
    [b"\xff" * 64, pack(b"no message"), pack(PIPE.encode(CLOSE))[:-1], pack(PIPE.encode(CLOSE) + b"\0"), pack(b"")],
)
async def test_nonsense_costs_its_stream_and_nothing_else(nonsense: bytes, autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        stream = await one.host.open_stream(other.peer, PROTOCOL)
        await stream.send_all(nonsense)
        await stream.send_eof()
        with trio.fail_after(5), pytest.raises(PeerUnreachable):
            while await stream.receive_some():
                pass
        await one.pipes.send(other.peer, CLOSE)
        await other.until(lambda: other.heard, 5)


async def test_a_pipe_that_breaks_is_reported_within_two_pings(autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        await one.pipes.send(other.peer, CLOSE)
        await other.until(lambda: other.heard, 5)
        other.broken = True
        await one.pipes.send(other.peer, CLOSE)
        await one.until(lambda: one.lost, 2.5)
        assert [peer for peer, _ in one.lost] == [other.peer]


async def test_clocks_are_compared_soon_after_a_pipe_was_opened(autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        await one.pipes.send(other.peer, CLOSE)
        with trio.move_on_after(0.8):
            await trio.sleep_forever()
        assert one.pipes.clock_of(other.peer).compared >= 4
        assert other.pipes.clock_of(one.peer).compared >= 4


async def test_a_pipe_that_nobody_uses_is_quiet_and_its_clocks_are_compared_again_when_somebody_does(
    autojump_clock: MockClock,
) -> None:
    async with pair() as (one, other, network):
        await one.pipes.send(other.peer, CLOSE)
        await trio.sleep(100)
        clock = one.pipes.clock_of(other.peer)
        before = one.pipes.pings
        await trio.sleep(600)
        assert one.pipes.pings - before <= 10
        network.set_link(one.peer, other.peer, delay=0.005)
        await one.pipes.send(other.peer, STEP)
        await trio.sleep(0.5)
        assert clock.compared >= 4, "those of the idle time don't count any more"
        await one.pipes.send(other.peer, STEP)
        await other.until(lambda: len(other.heard) == 3, 1)
        assert other.heard[-1][3] == pytest.approx(5000, abs=100)


async def test_while_messages_flow_clocks_are_compared_every_second(autojump_clock: MockClock) -> None:
    async with pair() as (one, other, _):
        for _ in range(300):
            await one.pipes.send(other.peer, STEP)
            await trio.sleep(0.1)
        assert 30 <= one.pipes.pings <= 40


async def test_the_time_under_way_is_measured_against_the_clock_of_the_peer(autojump_clock: MockClock) -> None:
    offset = ClockOffset()
    assert offset.under_way_us(5, 10) == 0, "not compared yet"
    # The peer's clock is 1000 ahead; 50 there, 70 back, 10 in between.
    offset.add(Pong(number=1, ping_sent_us=100, received_us=1150, sent_us=1160), 230)
    assert offset.under_way_us(1200, 260) == pytest.approx(60, abs=10)
    # A slower exchange tells less.
    offset.add(Pong(number=2, ping_sent_us=300, received_us=1350, sent_us=1351), 900)
    assert offset.under_way_us(1200, 260) == pytest.approx(60, abs=10)


@pytest.mark.parametrize(
    "pong",
    [
        Pong(number=1, ping_sent_us=(1 << 63) - 1, received_us=0, sent_us=0),
        Pong(number=1, ping_sent_us=0, received_us=0, sent_us=(1 << 63) - 1),
        Pong(number=1, ping_sent_us=0, received_us=(1 << 63) - 1, sent_us=0),
        Pong(number=1, ping_sent_us=90, received_us=(1 << 63) - 1, sent_us=(1 << 63) - 1),
    ],
)
def test_a_peer_that_lies_about_time_stays_within_bounds(pong: Pong) -> None:
    offset = ClockOffset()
    offset.add(pong, 100)
    for sent_us in (0, 50, 1 << 40, (1 << 63) - 1):
        assert 0 <= offset.under_way_us(sent_us, 200) <= MOST_UNDER_WAY_US
    limit = HopTime(network_us=MOST_UNDER_WAY_US, queue_us=0, compute_us=0)
    assert PIPE.encode(Step(session=S, attempt=0, position=0, rows=1, sample=False, sent_us=0, times=(limit,)))
