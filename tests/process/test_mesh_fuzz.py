"""Injured inputs for a node that runs: over its control socket, its port, and every protocol that a member may speak.

`FUZZ_INPUTS` says how many of each (default: a few hundred).
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from meshnode.net import heartbeat, pipes
from meshnode.net.port import Stream
from meshnode.node import Node
from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement
from protocols.bitswap import messages as bitswap
from protocols.codec import encode
from protocols.envelope import sign_record
from protocols.errors import LocalProtocolError, MeshError
from protocols.ids import PeerId
from protocols.intent import messages as intent
from protocols.membership import HELLO
from protocols.membership import messages as membership
from protocols.pipe.messages import PIPE
from protocols.sync import messages as sync
from tests.fuzz.mutate import injured, message_of, odd_cbor, odd_json
from tests.fuzz.targets import framed, vectors
from tests.process.hostile import GONE
from tests.process.insiders import insider
from tests.process.mesh_rig import mesh_of, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process, pytest.mark.slow]

INPUTS = int(os.environ.get("FUZZ_INPUTS", "300"))
GROWTH_MB = 150
ANSWER_S = 20.0
BUG = ("Traceback", "command.failed", "because of a bug")

REQUESTS = (
    {"do": "status"},
    {
        "do": "generate",
        "prompt": "w1 w2",
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["x"],
    },
    {"do": "generate", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 1},
    {"do": "generate", "token_ids": [1, 2, 3], "max_tokens": 2, "repetition_penalty": 1.1},
    {"do": "ready", "seconds": 1},
    {"do": "serve", "model": "small-noise", "variant": "int4"},
    {"do": "feedback", "answer": "1", "correct": False, "label": "w7"},
    {"do": "fetch-manifest", "manifest": "bafyreiabc"},
    {"do": "pin", "manifest": "bafyreiabc", "variant": "int4"},
)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    """Whatever comes, the same process answers the same afterwards, and its log names no bug."""
    with mesh_of(tmp_path, 1, published=small_model(tmp_path / "model", layers=4)) as mesh:
        (member,) = mesh.members
        usual, process = tokens_of(member), member.process()
        assert process is not None
        before = process.memory_info().rss
        yield mesh
        assert process.is_running() and member.process() == process, member.last_words()
        assert tokens_of(member) == usual
        assert process.memory_info().rss - before < GROWTH_MB << 20
        log = member.log.read_text(errors="replace")
        for words in BUG:
            assert words not in log, log[max(0, log.index(words) - 3000) : log.index(words) + 3000]


def asked(member: Member, line: bytes) -> bytes:
    """The first words of the answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(os.fspath(Paths(member.folder).control_socket))
        with suppress(BrokenPipeError, ConnectionResetError):  # of more than a line, the rest is not read
            connection.sendall(line)
            if b"\n" not in line:
                connection.shutdown(socket.SHUT_WR)
            return connection.recv(1 << 16)
    return b""


def test_lines_on_the_control_socket(mesh: Mesh, rng: random.Random) -> None:
    (member,) = mesh.members
    seeds, answers = [json.dumps(request).encode() for request in REQUESTS], b""
    for _ in range(INPUTS):
        injure = rng.choice((odd_json, odd_json, injured))
        line = injure(rng.choice(seeds), rng) + rng.choice((b"\n", b"\n", b"\n{}\n", b""))
        answer = asked(member, line)
        assert b"because of a bug" not in answer and b'"internal"' not in answer, (line, answer)
        answers += answer[:20]
    assert all(word in answers for word in (b'{"done"', b'{"error"', b'{"text"'))


def test_bytes_on_the_port(mesh: Mesh, rng: random.Random) -> None:
    """As a stranger: the beginnings of a libp2p connection and of a TLS lane, and noise."""
    (member,) = mesh.members
    host, port = member.address.split("/")[2], int(member.address.split("/")[4])
    hello_tls = bytes.fromhex("16030100c8010000c40303") + bytes(32) + bytes.fromhex("20") + bytes(160)
    seeds = (
        b"\x13/multistream/1.0.0\n\x07/noise\n" + (32).to_bytes(2, "big") + bytes(32),
        b"\x13/multistream/1.0.0\n" + b"\x06/ping\n" * 20,
        hello_tls,
        bytes(64),
    )
    greeted = 0
    for _ in range(INPUTS):
        with socket.create_connection((host, port), timeout=ANSWER_S) as connection, suppress(OSError):
            connection.sendall(injured(rng.choice(seeds), rng))
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(1 << 12):  # until it hangs up, so that it has read everything
                answer += piece
            greeted += answer.startswith(b"\x13/multistream/1.0.0\n")
    print(f"{greeted} of {INPUTS} connections were greeted")
    assert greeted > INPUTS // 10


@pytest.mark.long
async def test_streams_and_gossip_of_a_member(mesh: Mesh, tmp_path: Path, rng: random.Random) -> None:
    (member,) = mesh.members
    peer = PeerId(member.peer_id)
    async with insider(mesh, tmp_path / "guest", ("serve", "publish")) as node:
        through = 0
        for number in range(INPUTS):
            protocol, data = rng.choice(SPOKEN)(rng)
            await come_back(node, member)
            with suppress(*GONE), trio.move_on_after(5):
                stream = await node.host.open_stream(peer, protocol)
                through += 1
                await spoken(stream, data)
            if number % 3 == 0:
                with suppress(*GONE, LocalProtocolError):
                    await node.host.publish(f"/meshnode/records/{node.membership_file.network_id}", record(node, rng))
        print(f"{through} of {INPUTS} streams were opened")
        assert through > INPUTS * 0.7
        await come_back(node, member)


async def come_back(node: Node, member: Member) -> None:
    """A peer that breaks a protocol loses its connection; it may come again at once."""
    peer = PeerId(member.peer_id)
    with trio.fail_after(60):
        while node.host.live(peer) is None or peer not in node.membership.members():
            while node.host.live(peer) is None and peer in node.membership.members():
                await node.membership.changes.wait()
            with suppress(*GONE), trio.move_on_after(5):
                await node.host.connect(peer, [member.address])
                await node.membership.admitted(peer)


async def spoken(stream: Stream, data: bytes) -> None:
    try:
        await stream.send_all(data)
        await stream.send_eof()
        with trio.move_on_after(0.1):
            await stream.receive_some()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1), suppress(MeshError):
            await stream.aclose()


def record(node: Node, rng: random.Random) -> bytes:
    """A record that the member has signed, with something odd in it."""
    message = message_of(rng.choice((Advert, Announcement)), rng)
    payload = encode(message)
    domain = ADVERT if isinstance(message, Advert) else HEAD
    whole = sign_record(node.identity.signing_key, domain, rng.choice((odd_cbor, injured))(payload, rng)[: 1 << 14])
    return whole if rng.random() < 0.7 else injured(whole, rng)


def of_frames(protocol: str, union: object) -> object:
    fresh = framed(union)  # type: ignore[arg-type]
    return lambda rng: (protocol, injured(fresh(rng), rng) if rng.random() < 0.7 else fresh(rng))


def of_bitswap(rng: random.Random) -> tuple[str, bytes]:
    data = rng.choice([data for data in vectors("bitswap") if len(data) < 128])
    return bitswap.PROTOCOL, injured(bytes((len(data),)) + data, rng)


def of_heartbeat(rng: random.Random) -> tuple[str, bytes]:
    return heartbeat.PROTOCOL, rng.randbytes(rng.randrange(100))


SPOKEN = (
    of_frames(membership.PROTOCOL, HELLO),
    of_frames(sync.PROTOCOL, sync.SYNC),
    of_frames(intent.PROTOCOL, intent.HOLDS),
    of_frames(pipes.PROTOCOL, PIPE),
    of_bitswap,
    of_heartbeat,
)
