"""What a hostile or broken peer can do to a node: nothing but lose its own connection.

The victim is a process of its own; the attackers use the library as it comes. After every attack an old and a new
connection still work. All but the first group are strangers; a few are members that have gone bad.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import multiaddr
import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service

from meshnode.core.errors import PeerUnreachable
from meshnode.net.libp2p.host import open_host
from meshnode.net.port import Lane
from tests.process.libp2p_victim import (
    COUNT,
    ECHO,
    NEVER,
    PUBLIC,
    RAISE,
    TOPIC,
    Member,
    Victim,
    gossips,
    member,
    served,
)

pytestmark = [pytest.mark.net, pytest.mark.process]

LOOPBACK = multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")
MESHSUB = "/meshsub/1.2.0"


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    victim = Victim(secrets.token_bytes(32))
    yield victim
    lived = victim.lives
    errors = victim.end()
    assert lived, errors


@pytest.fixture
async def old(victim: Victim) -> AsyncIterator[Member]:
    """A connection that is there before the attack and must work after it, as must a new one."""
    async with member(victim) as host:
        await gossips(host)
        yield host
        assert victim.lives
        await served(host, victim)
        await gossips(host)
        async with member(victim) as new:
            await served(new, victim)
            await gossips(new)
        assert victim.peer in host.peers


@asynccontextmanager
async def attacker(victim: Victim, *, admitted: bool = False, plaintext: bool = False) -> AsyncIterator[Any]:
    """A host of the library as it comes, connected to the victim."""
    keys = create_new_key_pair()
    security: dict[Any, Any] = {NOISE: Transport(keys, noise_privkey=create_noise_key_pair().private_key)}
    if plaintext:
        security = {PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)}
    host = new_host(key_pair=keys, sec_opt=security, muxer_opt={YAMUX: Yamux})
    if admitted:
        await victim.admit(str(host.get_id()))
    async with host.run(listen_addrs=[LOOPBACK]):
        try:
            await host.connect(info_from_p2p_addr(multiaddr.Multiaddr(victim.addresses[0])))
            yield host
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                await host.close()


def target(victim: Victim) -> Any:
    return info_from_p2p_addr(multiaddr.Multiaddr(victim.addresses[0])).peer_id


def muxed(host: Any, victim: Victim) -> Any:
    return host.get_network().get_connections(target(victim))[0].muxed_conn


def prefixed(data: bytes) -> bytes:
    """With its length as an unsigned varint in front."""
    out, length = b"", len(data)
    while length > 127:
        out += bytes((length & 127 | 128,))
        length >>= 7
    return out + bytes((length,)) + data


async def gone(stream: Any) -> None:
    """Wait until the victim has given up a stream."""
    with trio.fail_after(10), suppress(Exception):
        while await stream.read(4096):
            pass


def message(**fields: Any) -> bytes:
    rpc = rpc_pb2.RPC()
    one = rpc.publish.add()
    one.topicIDs.append(TOPIC)
    for name, value in {"seqno": os.urandom(8), "data": b"x", "signature": b"s" * 64, **fields}.items():
        setattr(one, name, value)
    return bytes(rpc.SerializeToString())


def control(change: Callable[[Any], None]) -> bytes:
    rpc = rpc_pb2.RPC()
    change(rpc)
    return bytes(rpc.SerializeToString())


def bad_prune(rpc: Any) -> None:
    prune = rpc.control.prune.add()
    prune.topicID, prune.backoff = TOPIC, 2**40
    prune.peers.add().peerID = os.urandom(5)


FRAMES = {
    "no protobuf": lambda: os.urandom(300),
    "hashed sender, undecodable key": lambda: message(from_id=b"\x12\x20" + os.urandom(32), key=os.urandom(40)),
    "hashed sender, key of unknown type": lambda: message(
        from_id=b"\x12\x20" + os.urandom(32), key=b"\x08\x63\x12\x02ab"
    ),
    "no sender": lambda: message(from_id=b"", key=b""),
    "short sender": lambda: message(from_id=os.urandom(3), key=b"x"),
    "above the size limit": lambda: message(from_id=b"\x12\x20" + os.urandom(32), data=bytes(1 << 20)),
    "graft of an unknown topic": lambda: control(lambda rpc: setattr(rpc.control.graft.add(), "topicID", "none")),
    "prune for ever": lambda: control(bad_prune),
    "have nonsense": lambda: control(lambda rpc: rpc.control.ihave.add().messageIDs.append(b"zz")),
    "want nonsense": lambda: control(lambda rpc: rpc.control.iwant.add().messageIDs.append(b"not-a-tuple(")),
    "bad peer record": lambda: control(lambda rpc: setattr(rpc, "senderRecord", os.urandom(100))),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_gossip_frames_that_end_the_library(victim: Victim, old: Member, name: str) -> None:
    async with attacker(victim, admitted=True) as host:
        stream = await host.new_stream(target(victim), [MESHSUB])
        with suppress(Exception):  # it may be refused while it is being sent
            await stream.write(prefixed(FRAMES[name]()))
        ping = await host.new_stream(target(victim), [PUBLIC])  # handled after the frame, so the frame was read
        await ping.write(b"x")
        assert await ping.read(1) == b"x"


async def test_a_handler_that_raises(victim: Victim, old: Member) -> None:
    for lane in Lane:
        stream = await old.open_stream(victim.peer, RAISE, lane)
        with pytest.raises(PeerUnreachable):
            await stream.send_all(b"x")
            while await stream.receive_some():
                pass
        await stream.aclose()


async def test_plaintext_is_not_spoken(victim: Victim, old: Member) -> None:
    with pytest.raises(Exception, match=r"."), trio.fail_after(15):
        async with attacker(victim, plaintext=True):
            raise AssertionError("the victim accepted an unencrypted connection")
    stream = await trio.open_tcp_stream("127.0.0.1", victim.port)
    lines = [b"/multistream/1.0.0\n", b"/plaintext/2.0.0\n", b"/secio/1.0.0\n", b"/tls/1.0.0\n", b"/noise\n"]
    await stream.send_all(b"".join(prefixed(line) for line in lines))
    answer = b""
    with trio.fail_after(10):
        while answer.count(b"\n") < 5:
            answer += await stream.receive_some()
    assert [line[1:] for line in answer.split(b"\n")[:5]] == [b"/multistream/1.0.0", *[b"na"] * 3, b"/noise"]
    await stream.aclose()


async def test_a_stranger_gets_and_brings_no_gossip(victim: Victim, old: Member) -> None:
    async with attacker(victim) as host:
        router = GossipSub([MESHSUB], 3, 2, 4, heartbeat_interval=1)
        pubsub = Pubsub(host, router)
        async with background_trio_service(pubsub), background_trio_service(router):
            await pubsub.wait_until_ready()
            subscription = await pubsub.subscribe(TOPIC)
            for protocol in (MESHSUB, ECHO, "/meshnode/heartbeat/1", "/meshnode/lane/1", "/ipfs/id/push/1.0.0"):
                with pytest.raises(Exception, match=r"failed to open a stream"):
                    await host.new_stream(target(victim), [protocol])
            await pubsub.publish(TOPIC, b"let me in")
            stream = await host.new_stream(target(victim), [PUBLIC])
            await stream.write(b"x")
            assert await stream.read(1) == b"x"
            with trio.move_on_after(1):
                while (await subscription.get()).data == b"let me in":  # our own
                    pass
                raise AssertionError("the victim gossips with strangers")
            assert not pubsub.peers and not pubsub.peer_topics


async def test_random_bytes_on_the_port(victim: Victim, old: Member) -> None:
    noise = prefixed(b"/multistream/1.0.0\n") + prefixed(b"/noise\n")
    for start in (
        b"",
        noise,
        noise + b"\x00\x20" + os.urandom(32),
        b"\x16",
        b"\x16\x03\x01\x02\x00\x01",
        b"\xff" * 10,
    ):
        for _ in range(4):
            stream = await trio.open_tcp_stream("127.0.0.1", victim.port)
            with suppress(trio.BrokenResourceError):
                await stream.send_all(start + os.urandom(3000))
                await stream.send_eof()
            with trio.fail_after(20), suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
            await stream.aclose()


async def test_garbage_inside_noise_and_yamux(victim: Victim, old: Member) -> None:
    frames = [os.urandom(200) for _ in range(4)]
    frames.append(struct.pack("!BBHII", 0, 7, 0, 1, 0))  # unknown type
    frames.append(struct.pack("!BBHII", 9, 0, 0, 1, 0))  # unknown version
    frames.append(struct.pack("!BBHII", 0, 0, 1, 2, 0))  # a stream with a number of ours
    frames.append(struct.pack("!BBHII", 0, 0, 0, 77, 1 << 30))  # a body that nobody would hold
    for frame in frames:
        async with attacker(victim) as host:
            connection = muxed(host, victim)
            with suppress(Exception):
                await connection.secured_conn.write(frame)
            with trio.fail_after(10):
                await connection.event_closed.wait()
    async with attacker(victim) as host:
        connection = muxed(host, victim)
        await connection.secured_conn.conn.read_writer.read_write_closer.write(b"\x40\x00" + os.urandom(0x4000))
        with trio.fail_after(10):
            await connection.event_closed.wait()


async def test_garbage_on_streams(victim: Victim, old: Member) -> None:
    async with attacker(victim, admitted=True) as host:
        for protocol in ("/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/meshnode/lane/1", "/meshnode/heartbeat/1", MESHSUB):
            beats = "ping" in protocol or "heartbeat" in protocol  # every one comes back, in its own time
            stream = await host.new_stream(target(victim), [protocol])
            with suppress(Exception):
                await stream.write(os.urandom(320 if beats else 5000))
                await stream.close_write()
            await gone(stream)
        for proposal in (os.urandom(500), b"\xff" * 20, prefixed(b"x" * 2000), prefixed(b"\xff\xfe")):
            stream = await muxed(host, victim).open_stream()
            with suppress(Exception):
                await stream.write(proposal)
            await gone(stream)


async def test_a_writer_that_ignores_the_window(victim: Victim, old: Member) -> None:
    before = victim.rss_mb
    async with attacker(victim, admitted=True) as host:
        stream = await host.new_stream(target(victim), [NEVER])
        connection = muxed(host, victim)
        frame = struct.pack("!BBHII", 0, 0, 0, stream.muxed_stream.stream_id, 60_000) + bytes(60_000)
        with suppress(Exception), trio.fail_after(20):
            for _ in range(100 * 1024 * 1024 // 60_000):
                await connection.secured_conn.write(frame)
        with trio.fail_after(10):
            await connection.event_closed.wait()
    assert victim.rss_mb < before + 20


async def test_streams_without_end(victim: Victim, old: Member) -> None:
    """Thousands of streams, opened, reset, never read: the peer is limited or loses its connection."""
    before = victim.rss_mb
    for flags in (1, 1 | 8):
        async with attacker(victim) as host:
            connection = muxed(host, victim)
            with suppress(Exception), trio.move_on_after(5):
                for number in range(5000):
                    await connection.secured_conn.write(struct.pack("!BBHII", 0, 1, flags, 10_001 + 2 * number, 0))
    async with attacker(victim) as host:  # pings whose answers are never read
        connection = muxed(host, victim)
        with suppress(Exception), trio.move_on_after(3):
            for number in range(20_000):
                await connection.secured_conn.write(struct.pack("!BBHII", 0, 2, 1, 0, number))
    assert victim.rss_mb < before + 40


async def test_five_hundred_idle_sockets(victim: Victim, old: Member) -> None:
    sockets = [socket.create_connection(("127.0.0.1", victim.port)) for _ in range(500)]
    try:
        await served(old, victim)
        async with member(victim) as new:
            await served(new, victim)
    finally:
        for one in sockets:
            one.close()


async def test_more_strangers_than_places(nursery: trio.Nursery, victim: Victim, old: Member) -> None:
    """Authenticated peers without a membership: the oldest makes room, members are not touched."""
    for _ in range(70):
        stranger = open_host(secrets.token_bytes(32))
        await nursery.start(stranger.run)
        await stranger.connect(victim.peer, victim.addresses)
    with trio.fail_after(10):
        while len(await victim.peers()) > 65:  # noqa: ASYNC110 - no event tells it
            await trio.sleep(0.05)
    assert old.peer_id in await victim.peers()
    await served(old, victim)


async def identified(host: Any, victim: Victim) -> set[str]:
    """The protocols that the victim offers to us."""
    stream = await host.new_stream(target(victim), ["/ipfs/id/1.0.0"])
    return set(parse_identify_response(await stream.read()).protocols)


async def test_a_stranger_is_not_told_what_members_may_use(victim: Victim) -> None:
    async with attacker(victim) as host:
        offered = await identified(host, victim)
        assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"} <= offered
        assert not {COUNT, MESHSUB} & offered and PUBLIC in offered


async def test_the_library_as_it_comes_is_understood(victim: Victim, old: Member) -> None:
    """A peer that is no meshnode: ping, identify, and a message above what the library's own reads can take."""
    async with attacker(victim, admitted=True) as host:
        assert {COUNT, ECHO, "/ipfs/ping/1.0.0", MESHSUB} <= await identified(host, victim)
        ping = await host.new_stream(target(victim), ["/ipfs/ping/1.0.0"])
        await ping.write(b"p" * 32)
        assert await ping.read(32) == b"p" * 32
        stream = await host.new_stream(target(victim), [COUNT])
        await stream.write(bytes(8 << 20))
        await stream.close_write()
        assert await stream.read(100) == b"%d" % (8 << 20)
        stream = await host.new_stream(target(victim), [ECHO])
        data, got = os.urandom(8 << 20), bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            while len(got) < len(data):
                got += await stream.read(1 << 16)
        assert bytes(got) == data
