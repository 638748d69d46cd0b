"""The conformance suite of the net port: every check in `CHECKS` holds on every kind of host."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import pytest
import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net.port import MAX_GOSSIP_BYTES, Handler, Host, Lane, Stream
from meshnode.net.protocol_table import STREAM_BURST
from protocols.errors import LocalProtocolError
from protocols.ids import PeerId
from tests.gossip import anything, inbox_of

Make = Callable[[], Host]  # a new host of one network, not running yet
Check = Callable[[Make], Awaitable[None]]

ECHO: Final = "/check/echo/1"
COUNT: Final = "/check/count/1"
RAISE: Final = "/check/raise/1"
GREET: Final = "/check/greet/1"
WAIT: Final = "/check/wait/1"
PUBLIC: Final = "/check/public/1"
TOPIC: Final = "/check/topic"
TWENTY_MB: Final = 20_000_000
NOBODY: Final = PeerId("12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN")


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def count(stream: Stream) -> None:
    """Answer with size and hash after the clean end."""
    size, digest = 0, hashlib.sha256()
    while data := await stream.receive_some(1 << 18):
        size += len(data)
        digest.update(data)
    await stream.send_all(size.to_bytes(8, "big") + digest.digest())


async def fail(stream: Stream) -> None:
    await stream.receive_some()
    raise ZeroDivisionError("a bug in a handler")


async def greet(stream: Stream) -> None:
    await stream.send_all(b"good day")


class Waiting:
    """A handler that reads until its stream is over, and remembers how that went."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.began = trio.Event()
        self.over = trio.Event()

    async def __call__(self, stream: Stream) -> None:
        self.began.set()
        try:
            while await stream.receive_some():
                pass
            self.ends.append("clean")
        except PeerUnreachable:
            self.ends.append("unreachable")
            raise
        finally:
            self.over.set()


SERVED: Final[dict[str, Handler]] = {ECHO: echo, COUNT: count, RAISE: fail, GREET: greet}


@asynccontextmanager
async def running(*hosts: Host) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for host in hosts:
            await nursery.start(host.run)
        with trio.fail_after(40):
            yield
        nursery.cancel_scope.cancel()


async def meet(one: Host, other: Host, *, admitted: bool = True) -> None:
    """Connect two hosts and wait until both know; admit each other before that, as members do soon after."""
    if admitted:
        one.admit(other.peer_id, True)
        other.admit(one.peer_id, True)
    events = other.events()
    await one.connect(other.peer_id, other.addresses)
    with trio.fail_after(5):
        while one.peer_id not in other.peers:
            await events.receive()


def serving(make: Make) -> Host:
    """A host that serves what all of them serve."""
    host = make()
    for protocol, handler in SERVED.items():
        host.handle(protocol, handler)
    host.handle(PUBLIC, greet, open_to_strangers=True)
    return host


@asynccontextmanager
async def pair(make: Make, *, admitted: bool = True, **more: Handler) -> AsyncIterator[tuple[Host, Host]]:
    """Two connected hosts that serve the same things."""
    one, other = serving(make), serving(make)
    for handler in more.values():
        other.handle(WAIT, handler)
    async with running(one, other):
        await meet(one, other, admitted=admitted)
        yield one, other


async def read_all(stream: Stream) -> bytes:
    out = b""
    while data := await stream.receive_some(1 << 18):
        out += data
    return out


async def read_exact(stream: Stream, size: int) -> bytes:
    out = b""
    while len(out) < size:
        data = await stream.receive_some(size - len(out))
        assert data, "the stream ended early"
        out += data
    return out


async def exchange(one: Host, other: Host, protocol: str, lane: Lane, data: bytes = b"") -> bytes:
    """Send it all, end, and read it all."""
    stream = await one.open_stream(other.peer_id, protocol, lane)
    if data:
        await stream.send_all(data)
    await stream.send_eof()
    answer = await read_all(stream)
    await stream.aclose()
    return answer


async def works(one: Host, other: Host, lane: Lane = Lane.CONTROL) -> None:
    assert await exchange(one, other, ECHO, lane, b"still there?") == b"still there?"


async def lost(host: Host, peer: PeerId) -> str:
    """Wait until a peer is gone; the reason."""
    events = host.events()
    with trio.fail_after(10):
        async for event in events:
            if event.peer == peer and not event.connected:
                return event.reason
    raise AssertionError("the events ended")


async def check_streams_both_ways(make: Make) -> None:
    async with pair(make) as (one, other):
        for lane in Lane:
            await works(one, other, lane)
            await works(other, one, lane)
            stream = await one.open_stream(other.peer_id, ECHO, lane)
            assert stream.peer == other.peer_id
            for size in (1, 4096, 100_000):
                data = os.urandom(size)
                await stream.send_all(data)
                assert await read_exact(stream, size) == data
            await stream.send_all(memoryview(b"a view"))
            assert await read_exact(stream, 6) == b"a view"
            await stream.aclose()


async def check_half_close(make: Make) -> None:
    async with pair(make) as (one, other):
        for lane in Lane:
            stream = await one.open_stream(other.peer_id, COUNT, lane)
            await stream.send_all(b"abc")
            await stream.send_eof()
            with pytest.raises(PeerUnreachable, match="closed"):
                await stream.send_all(b"more")
            answer = await read_all(stream)
            assert answer == (3).to_bytes(8, "big") + hashlib.sha256(b"abc").digest()
            assert await stream.receive_some() == b""  # the end stays the end
            await stream.aclose()
            with pytest.raises(PeerUnreachable):
                await stream.receive_some()


async def check_an_end_at_once(make: Make) -> None:
    """Ended before a byte was sent; and a handler that speaks first."""
    async with pair(make) as (one, other):
        for lane in Lane:
            assert int.from_bytes((await exchange(one, other, COUNT, lane))[:8], "big") == 0
            stream = await one.open_stream(other.peer_id, GREET, lane)
            assert await read_all(stream) == b"good day"
            await stream.aclose()


async def check_a_handler_that_raises(make: Make) -> None:
    async with pair(make) as (one, other):
        for lane in Lane:
            stream = await one.open_stream(other.peer_id, RAISE, lane)
            await stream.send_all(b"x")
            with pytest.raises(PeerUnreachable):
                await read_all(stream)
            await stream.aclose()
            await works(one, other, lane)


async def check_a_reset_is_no_clean_end(make: Make) -> None:
    for lane in Lane:
        waiting = Waiting()
        async with pair(make, waiting=waiting) as (one, other):
            stream = await one.open_stream(other.peer_id, WAIT, lane)
            await stream.send_all(b"x")
            await waiting.began.wait()
            await stream.reset()
            with pytest.raises(PeerUnreachable):
                await stream.send_all(b"x")
            with pytest.raises(PeerUnreachable):
                await stream.receive_some()
            await waiting.over.wait()
            assert waiting.ends == ["unreachable"]
            await works(one, other, lane)


async def check_a_closed_stream_ends_cleanly(make: Make) -> None:
    for lane in Lane:
        waiting = Waiting()
        async with pair(make, waiting=waiting) as (one, other):
            stream = await one.open_stream(other.peer_id, WAIT, lane)
            await stream.send_all(bytes(10_000))
            await stream.aclose()
            await stream.aclose()
            await waiting.over.wait()
            assert waiting.ends == ["clean"]


async def check_what_is_not_served_is_declined(make: Make) -> None:
    async with pair(make) as (one, other):
        for lane in Lane:
            with pytest.raises(Declined, match="does not serve /check/unknown/1") as caught:
                await one.open_stream(other.peer_id, "/check/unknown/1", lane)
            assert (caught.value.code, caught.value.peer) == ("not-served", other.peer_id)
        await works(one, other)


async def check_strangers_are_declined(make: Make) -> None:
    async with pair(make, admitted=False) as (one, other):
        for lane in Lane:
            for protocol in (ECHO, "/check/unknown/1"):
                with pytest.raises(Declined, match="does not admit us") as caught:
                    await one.open_stream(other.peer_id, protocol, lane)
                assert (caught.value.code, caught.value.peer) == ("stranger", other.peer_id)
            stream = await one.open_stream(other.peer_id, PUBLIC, lane)
            assert await read_all(stream) == b"good day"
            await stream.aclose()
        one.admit(other.peer_id, True)  # says nothing about how the other one sees us
        with pytest.raises(Declined, match="does not admit us"):
            await one.open_stream(other.peer_id, ECHO)
        other.admit(one.peer_id, True)
        for lane in Lane:
            await works(one, other, lane)
            await works(other, one, lane)


async def check_guests_may_do_what_they_were_granted_and_nothing_else(make: Make) -> None:
    one, other = serving(make), serving(make)
    inbox = inbox_of(other, TOPIC)
    one.subscribe(TOPIC, anything)
    other.welcome(one.peer_id, (ECHO,))
    async with running(one, other):
        everybody, guests = other.events(), other.guest_events()
        await one.connect(other.peer_id, other.addresses)
        event = await guests.receive()
        assert (event.peer, event.connected) == (one.peer_id, True)
        assert (other.peers, other.guests) == ((), (one.peer_id,))
        for lane in Lane:
            await works(one, other, lane)
            for protocol in (GREET, PUBLIC, "/check/unknown/1"):
                with pytest.raises(Declined):
                    await one.open_stream(other.peer_id, protocol, lane)
        one.admit(other.peer_id, True)
        await one.publish(TOPIC, b"from a guest")
        await other.publish(TOPIC, b"not for guests")
        await one.disconnect(other.peer_id, "enough")
        event = await guests.receive()
        assert (event.peer, event.connected) == (one.peer_id, False)
        assert other.guests == ()
        with pytest.raises(trio.WouldBlock):
            everybody.receive_nowait()
        with pytest.raises(trio.WouldBlock):
            inbox.receive_nowait()


async def check_guests_come_and_go_while_it_runs(make: Make) -> None:
    one, other = serving(make), serving(make)
    async with running(one, other):
        everybody, guests = other.events(), other.guest_events()
        await one.connect(other.peer_id, other.addresses)
        assert (await everybody.receive()).connected
        other.welcome(one.peer_id, (ECHO,))  # it is connected already
        assert not (await everybody.receive()).connected
        assert (await guests.receive()).connected
        assert (other.peers, other.guests) == ((), (one.peer_id,))
        await works(one, other, Lane.BULK)
        await other.dismiss(one.peer_id, "enough")
        assert not (await guests.receive()).connected
        assert other.guests == ()
        gone = one.events()
        while one.peers:
            await gone.receive()
        await one.connect(other.peer_id, other.addresses)
        assert (await everybody.receive()).connected
        with pytest.raises(Declined):
            await one.open_stream(other.peer_id, ECHO)
        await other.dismiss(one.peer_id, "it is none")
        assert (other.peers, other.guests) == ((one.peer_id,), ())


async def check_withdrawn_members_are_disconnected(make: Make) -> None:
    waiting = Waiting()
    async with pair(make, waiting=waiting) as (one, other):
        streams = [await one.open_stream(other.peer_id, WAIT, lane) for lane in Lane]
        await waiting.began.wait()
        async with trio.open_nursery() as nursery:
            for host, peer in ((one, other.peer_id), (other, one.peer_id)):
                nursery.start_soon(lost, host, peer)
            await trio.testing.wait_all_tasks_blocked(0.01)
            other.admit(one.peer_id, False)
        for stream in streams:
            with pytest.raises(PeerUnreachable):
                await stream.receive_some()
            await stream.aclose()
        assert one.peers == other.peers == ()
        await one.connect(other.peer_id, other.addresses)
        with pytest.raises(Declined, match="does not admit us"):
            await one.open_stream(other.peer_id, ECHO)


async def check_gossip(make: Make) -> None:
    """From one over a second to a third; not to ourselves, not to strangers, not what a validator rejects."""
    one, two, three, stranger = [make() for _ in range(4)]
    seen: list[tuple[PeerId, bytes]] = []

    def judge(forwarder: PeerId, data: bytes) -> bool:
        seen.append((forwarder, data))
        if data == b"nonsense":
            raise KeyError("a bug in a validator")
        return data != b"bad"

    inboxes = [inbox_of(host, TOPIC, judge if host is two else anything) for host in (one, two, three)]
    outside = inbox_of(stranger, TOPIC)
    with pytest.raises(LocalProtocolError):
        one.subscribe(TOPIC, anything)
    async with running(one, two, three, stranger):
        await meet(one, two)
        await meet(two, three)
        await meet(stranger, two, admitted=False)
        await until_gossip_flows(one, inboxes[2], b"begin from one ")
        await until_gossip_flows(three, inboxes[0], b"begin from three ")
        for data in (b"bad", b"nonsense", b"good"):
            await one.publish(TOPIC, data)
        assert await next_other(inboxes[1]) == (one.peer_id, b"good")
        assert await next_other(inboxes[2]) == (two.peer_id, b"good")
        assert (one.peer_id, b"bad") in seen and (one.peer_id, b"nonsense") in seen
        await stranger.publish(TOPIC, b"let me in")
        largest = bytes(MAX_GOSSIP_BYTES)
        await three.publish(TOPIC, largest)
        assert await next_other(inboxes[0]) == (two.peer_id, largest)
        with pytest.raises(LocalProtocolError, match="65536"):
            await one.publish(TOPIC, bytes(MAX_GOSSIP_BYTES + 1))
        await three.publish(TOPIC, b"last")
        assert await next_other(inboxes[0]) == (two.peer_id, b"last")
        for inbox in (*inboxes[1:], outside):
            with pytest.raises(trio.WouldBlock):
                while True:
                    _, data = inbox.receive_nowait()
                    assert data.startswith(b"begin") or (inbox is not outside and data in (largest, b"last"))
        assert not [data for _, data in seen if data == b"let me in"]


async def until_gossip_flows(
    sender: Host, inbox: trio.MemoryReceiveChannel[tuple[PeerId, bytes]], prefix: bytes
) -> None:
    """Publish until something arrives: gossip may lose what is said before its partners have met."""
    with trio.fail_after(15):
        for number in range(1000):
            await sender.publish(TOPIC, prefix + str(number).encode())
            with trio.move_on_after(0.2):
                while True:
                    _, data = await inbox.receive()
                    if data.startswith(prefix):
                        return


async def next_other(inbox: trio.MemoryReceiveChannel[tuple[PeerId, bytes]]) -> tuple[PeerId, bytes]:
    """The next message that is not from `until_gossip_flows`."""
    with trio.fail_after(5):
        async for peer, data in inbox:
            if not data.startswith(b"begin"):
                return peer, data
    raise AssertionError("the channel ended")


async def check_events(make: Make) -> None:
    one, other, third = make(), make(), make()
    early = one.events()
    async with running(one, other, third):
        await meet(one, other)
        await one.connect(other.peer_id, other.addresses)  # nothing new
        await meet(third, one)
        assert one.peers == tuple(sorted((other.peer_id, third.peer_id)))
        late = one.events()
        await one.disconnect(other.peer_id, "a reason of ours")
        assert one.peers == (third.peer_id,)
        with trio.fail_after(5):
            told = [await early.receive() for _ in range(3)]
            told_late = [await late.receive() for _ in range(3)]
        assert [(e.peer, e.connected) for e in told] == [
            (other.peer_id, True),
            (third.peer_id, True),
            (other.peer_id, False),
        ]
        assert told[2].reason == "a reason of ours"
        assert [e.peer for e in told_late[:2]] == sorted((other.peer_id, third.peer_id))
        assert told_late[2] == told[2]
        if one.peer_id in other.peers:
            assert await lost(other, one.peer_id)
        await one.disconnect(NOBODY, "was never there")
        await meet(one, other)
        assert (await early.receive()).connected


async def check_large_transfers(make: Make) -> None:
    async with pair(make) as (one, other):
        data = os.urandom(TWENTY_MB)
        digest = len(data).to_bytes(8, "big") + hashlib.sha256(data).digest()
        for lane in Lane:
            assert await exchange(one, other, COUNT, lane, data) == digest
        stream = await one.open_stream(other.peer_id, ECHO, Lane.BULK)
        async with trio.open_nursery() as nursery:  # both ways at once

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            assert hashlib.sha256(await read_exact(stream, TWENTY_MB)).digest() == digest[8:]
        await stream.aclose()


async def check_connecting_fails_in_words(make: Make) -> None:
    async with pair(make) as (one, other):
        with pytest.raises(PeerUnreachable, match="this very node"):
            await one.connect(one.peer_id, one.addresses)
        for addresses in ((), ("/ip4/127.0.0.1/tcp/1",), (other.addresses[0].replace(other.peer_id, NOBODY),)):
            with pytest.raises(PeerUnreachable) as caught:
                await one.connect(NOBODY, addresses)
            assert caught.value.peer == NOBODY and NOBODY in str(caught.value)
        with pytest.raises(PeerUnreachable, match="not connected"):
            await one.open_stream(NOBODY, ECHO)
        assert one.peers == (other.peer_id,)
        await works(one, other)


async def check_dead_addresses_are_passed_over(make: Make) -> None:
    one, other = make(), make()
    async with running(one, other):
        await one.connect(other.peer_id, ("/ip4/127.0.0.1/tcp/1", *other.addresses))
        assert one.peers == (other.peer_id,)


async def check_both_dial_at_the_same_time(make: Make) -> None:
    one, other = serving(make), serving(make)
    async with running(one, other):
        one.admit(other.peer_id, True)
        other.admit(one.peer_id, True)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(one.connect, other.peer_id, other.addresses)
                nursery.start_soon(other.connect, one.peer_id, one.addresses)
        for lane in Lane:
            await works(one, other, lane)
            await works(other, one, lane)
        assert (one.peers, other.peers) == ((other.peer_id,), (one.peer_id,))
        await one.disconnect(other.peer_id, "enough")
        if one.peer_id in other.peers:
            await lost(other, one.peer_id)
        assert one.peers == other.peers == ()


async def check_a_cancelled_read_takes_nothing(make: Make) -> None:
    async with pair(make) as (one, other):
        for lane in Lane:
            stream = await one.open_stream(other.peer_id, ECHO, lane)
            sent, got = os.urandom(200_000), b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, sent)
                while len(got) < len(sent):
                    with trio.move_on_after(0.0005):
                        got += await stream.receive_some(1000)
            assert got == sent
            await stream.aclose()


async def check_disconnecting_breaks_every_lane(make: Make) -> None:
    waiting = Waiting()
    async with pair(make, waiting=waiting) as (one, other):
        streams = [await one.open_stream(other.peer_id, WAIT, lane) for lane in Lane]
        broken: list[Stream] = []

        async def read(stream: Stream) -> None:
            with pytest.raises(PeerUnreachable):
                await stream.receive_some()
            broken.append(stream)

        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(read, stream)
            await waiting.began.wait()
            await one.disconnect(other.peer_id, "enough")
        assert len(broken) == 3
        for stream in streams:
            with pytest.raises(PeerUnreachable):
                await stream.send_all(b"x")
            await stream.aclose()


async def check_last_words_are_heard(make: Make) -> None:
    """What was sent before a disconnection is read, and read before the peer is said to be gone."""
    one, other = make(), make()
    heard: list[bytes] = []

    async def speak(stream: Stream) -> None:
        await stream.send_all(b"you are not welcome")
        await stream.send_eof()
        await other.disconnect(stream.peer, "unwelcome")

    other.handle(PUBLIC, speak, open_to_strangers=True)
    async with running(one, other):
        await meet(one, other, admitted=False)
        stream = await one.open_stream(other.peer_id, PUBLIC)

        async def read() -> None:
            heard.append(await read_all(stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await lost(one, other.peer_id)
            assert heard == [b"you are not welcome"]


async def check_a_stopped_host_is_missed(make: Make) -> None:
    one, other = make(), make()
    async with running(one):
        async with running(other):
            await meet(one, other)
        assert not one.peers or await lost(one, other.peer_id)
        assert one.peers == ()
        with pytest.raises(PeerUnreachable):
            await one.connect(other.peer_id, other.addresses)


async def check_many_streams_at_once(make: Make) -> None:
    async with pair(make) as (one, other):
        for lane in Lane:
            async with trio.open_nursery() as nursery:
                for _ in range(30):
                    nursery.start_soon(works, one, other, lane)
                    nursery.start_soon(works, other, one, lane)


async def check_a_flood_of_streams_is_dropped_and_named(make: Make) -> None:
    async with pair(make) as (one, other):
        floods: list[tuple[PeerId, str]] = []
        other.on_flood(lambda peer, protocol: floods.append((peer, protocol)))

        async def greeted() -> bool:
            try:
                return await exchange(one, other, GREET, Lane.CONTROL) == b"good day"
            except PeerUnreachable:
                return False

        answers = [await greeted() for _ in range(round(STREAM_BURST) + 60)]
        assert all(answers[: round(STREAM_BURST)])
        assert not all(answers)
        assert {peer for peer, _ in floods} == {one.peer_id}
        assert GREET in {protocol for _, protocol in floods}
        await works(one, other, Lane.CONTROL)  # another protocol of the same peer


async def check_round_trips_are_known(make: Make) -> None:
    async with pair(make) as (one, other):
        with trio.fail_after(8):
            version = 0
            while (trip := one.round_trip_us(other.peer_id)) is None:
                version = await one.links.wait(version)
        assert 0 < trip < 5_000_000
        assert one.round_trip_us(NOBODY) is None
        version = one.links.version
        await other.disconnect(one.peer_id, "a pause")
        with trio.fail_after(8):
            while one.round_trip_us(other.peer_id) is not None:
                version = await one.links.wait(version)


CHECKS: Final[tuple[Check, ...]] = tuple(
    check for name, check in list(globals().items()) if name.startswith("check_")
)
