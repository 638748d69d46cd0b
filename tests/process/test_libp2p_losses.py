"""Peers that die, hang or dawdle, and ports that are taken: noticed in time, and not mistaken for each other."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from meshnode.core.errors import ConfigError, PeerUnreachable
from meshnode.net.libp2p.host import Libp2pHost, open_host
from meshnode.net.port import Lane, Stream
from protocols.ids import PeerId
from tests.process.libp2p_victim import COUNT, ECHO, NEVER, PAUSE, PAUSE_S, Member, Victim, member, served

pytestmark = [pytest.mark.net, pytest.mark.process]

NOTICED_S = 5.0
SLACK_S = 3.0  # what a busy test machine may add


@pytest.fixture
async def victim() -> AsyncIterator[Victim]:
    victim = await trio.to_thread.run_sync(Victim, secrets.token_bytes(32))
    try:
        yield victim
    finally:
        victim.end()


async def gone(host: Libp2pHost, peer: PeerId) -> str:
    events = host.events()
    async for event in events:
        if event.peer == peer and not event.connected:
            return event.reason
    raise AssertionError("the events ended")


async def breaks(stream: Stream) -> None:
    """A read that waits while the peer dies ends with PeerUnreachable, not with a clean end."""
    with pytest.raises(PeerUnreachable):
        while await stream.receive_some():
            pass


async def notices(victim: Victim, host: Member, strike: Callable[[], None]) -> str:
    """Strike while reads wait on every lane; the reason that the host gives for the loss."""
    await served(host, victim)
    reason = ""
    async with trio.open_nursery() as nursery:
        for lane in Lane:
            nursery.start_soon(breaks, await host.open_stream(victim.peer, NEVER, lane))
        await trio.testing.wait_all_tasks_blocked(0.05)
        strike()
        with trio.fail_after(NOTICED_S + SLACK_S):
            reason = await gone(host, victim.peer)
    assert victim.peer not in host.peers
    assert host.round_trip_us(victim.peer) is None
    with pytest.raises(PeerUnreachable):
        await host.open_stream(victim.peer, ECHO)
    return reason


async def test_a_killed_peer(victim: Victim) -> None:
    async with member(victim) as host:
        reason = await notices(victim, host, victim.process.kill)
        assert "lost" in reason or "closed" in reason
        with pytest.raises(PeerUnreachable, match="refused"), trio.fail_after(5):
            await host.connect(victim.peer, victim.addresses)


async def test_a_stopped_peer(victim: Victim) -> None:
    async with member(victim) as host:
        reason = await notices(victim, host, lambda: os.kill(victim.process.pid, signal.SIGSTOP))
        assert reason == "no heartbeat for 4 s"
        os.kill(victim.process.pid, signal.SIGCONT)
        with trio.fail_after(10):
            while victim.peer not in host.peers:  # it may still be busy with the loss of the old connection
                await host.connect(victim.peer, victim.addresses)
        await served(host, victim)


async def test_a_peer_that_is_killed_while_it_sends(victim: Victim) -> None:
    async with member(victim) as host:
        for lane in Lane:
            stream = await host.open_stream(victim.peer, ECHO, lane)

            async def send(stream: Stream = stream) -> None:
                with pytest.raises(PeerUnreachable):
                    while True:
                        await stream.send_all(bytes(1 << 16))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert await stream.receive_some()
                if lane is Lane.BULK:
                    victim.process.kill()
                    await breaks(stream)
                else:
                    await stream.reset()


async def test_a_reader_that_pauses_keeps_its_stream(victim: Victim) -> None:
    """Six seconds without reading, with far more under way than any window holds; all lanes at once."""
    size = 24 << 20

    async def send_slowly(host: Member, lane: Lane) -> None:
        stream = await host.open_stream(victim.peer, PAUSE, lane)
        with trio.fail_after(PAUSE_S + 30):
            await stream.send_all(bytes(size))
            await stream.send_eof()
            assert await stream.receive_some(100) == b"%d" % size
        await stream.aclose()

    async with member(victim) as host, trio.open_nursery() as nursery:
        for lane in Lane:
            nursery.start_soon(send_slowly, host, lane)


async def test_a_cancelled_sender_leaves_the_connection_whole(victim: Victim) -> None:
    async with member(victim) as host:
        for lane in Lane:
            for _ in range(5):
                stream = await host.open_stream(victim.peer, COUNT, lane)
                with trio.move_on_after(0.01):
                    await stream.send_all(bytes(64 << 20))
                await stream.reset()
        await served(host, victim)


async def test_a_port_in_use_is_said_in_a_sentence(victim: Victim) -> None:
    second = Libp2pHost(secrets.token_bytes(32), [f"/ip4/127.0.0.1/tcp/{victim.port}"])
    with pytest.raises(ConfigError, match=rf"/ip4/127.0.0.1/tcp/{victim.port}.*in use.*network\.listen"):
        await second.run()
    with pytest.raises(ConfigError, match=r"/ip4/0\.0\.0\.0/"):
        Libp2pHost(secrets.token_bytes(32), ["/dns4/localhost/tcp/0"])
    with pytest.raises(ConfigError, match=r"/ip4/192\.0\.2\.1/tcp/0"):
        await Libp2pHost(secrets.token_bytes(32), ["/ip4/127.0.0.1/tcp/0", "/ip4/192.0.2.1/tcp/0"]).run()
    async with member(victim) as host:
        await served(host, victim)


async def test_where_lanes_can_not_be_dialled_the_streams_of_libp2p_do(nursery: trio.Nursery, victim: Victim) -> None:
    """A peer behind a router: it has dialled us, and we can't dial it."""
    host = open_host(secrets.token_bytes(32))
    host.admit(victim.peer, True)
    await victim.admit(host.peer_id)
    await victim.order(do="be out of reach")
    await nursery.start(host.run)
    await victim.order(do="connect", peer=host.peer_id, addresses=host.addresses)
    for lane in (Lane.TOKEN, Lane.BULK):
        stream = await host.open_stream(victim.peer, ECHO, lane)
        assert type(stream).__name__ == "YamuxStream"
        await stream.aclose()
    await served(host, victim)


async def test_lanes_go_both_ways_whoever_has_dialled(victim: Victim) -> None:
    for we_dial in (True, False):
        host = open_host(secrets.token_bytes(32))
        host.admit(victim.peer, True)
        await victim.admit(host.peer_id)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            if we_dial:
                await host.connect(victim.peer, victim.addresses)
            else:
                await victim.order(do="connect", peer=host.peer_id, addresses=host.addresses)
            stream = await host.open_stream(victim.peer, ECHO, Lane.TOKEN)
            assert type(stream).__name__ == "TlsStream"
            await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_processes_that_dial_each_other_at_once(nursery: trio.Nursery, victim: Victim) -> None:
    host = open_host(secrets.token_bytes(32))
    host.handle(ECHO, lambda stream: stream.send_all(b"hello"))
    host.admit(victim.peer, True)
    await victim.admit(host.peer_id)
    await nursery.start(host.run)
    for _ in range(5):
        async with trio.open_nursery() as dials:
            dials.start_soon(host.connect, victim.peer, victim.addresses)
            order = {"do": "connect", "peer": host.peer_id, "addresses": host.addresses}
            dials.start_soon(lambda order=order: victim.order(**order))
        await served(host, victim)
        assert host.peers == (victim.peer,)
        await host.disconnect(victim.peer, "once more")
        with trio.fail_after(5):
            while await victim.peers():  # noqa: ASYNC110 - no event tells it
                await trio.sleep(0.02)
