"""Bitswap: both machines in random networks and under hostile bytes, with bounded memory and work.

The messages themselves are in test_wire.py, too.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.bitswap import client as c
from protocols.bitswap.ledger import MAX_WINDOW_BYTES
from protocols.bitswap.messages import (
    MAX_BLOCK_BYTES,
    MAX_ENTRIES,
    MAX_MESSAGE_BYTES,
    Block,
    Entry,
    Message,
    MessageReader,
    Presence,
    PresenceType,
    WantType,
    decode,
    encode,
)
from protocols.bitswap.server import MAX_PRESENCES, MAX_WANTS, Server
from protocols.bitswap.stalls import MAX_LACKS
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from tests.hostile import HUGE_NUMBERS, cost, mutated, varint
from tests.property.test_wire import BITSWAP
from tests.trees import numbered_cid

SIZE = 1 << 18


class World:
    """A client among peers that hold parts of a file, are slow, drop out, come back, lie or send nothing."""

    def __init__(self, seed: int, count: int) -> None:
        self.rng = random.Random(seed)
        self.client = c.Client()
        self.now = 0.0
        self.count = count
        self.got: dict[bytes, PeerId] = {}
        self.wires: dict[PeerId, list[tuple[float, c.Arrived]]] = {}
        self.wishes: dict[PeerId, dict[bytes, float]] = {}
        self.peers = {PeerId(f"p{i}"): self.rng.choice(["good", "half", "slow", "corrupt", "mute"]) for i in range(4)}
        self.peers[PeerId("sure")] = "good"
        self.up: set[PeerId] = set()

    def give(self, event: c.Event) -> None:
        for effect in self.client.handle(event, self.now):
            match effect:
                case c.Send(peer, message):
                    assert peer in self.up, "something was sent to a peer that is down"
                    self.answer(peer, message)
                case c.Got(sessions, cid, _, peer):
                    assert sessions == (1,) and cid not in self.got and self.peers[peer] != "corrupt"
                    self.got[cid] = peer
                case c.Banned(peer, _):
                    assert self.peers[peer] == "corrupt", "a good peer was banned"
                    self.up.discard(peer)
                case c.Stalled(peer, given_up):
                    assert self.peers[peer] in ("mute", "slow"), "a peer that sends was called silent"
                    if given_up:
                        self.up.discard(peer)
                        self.wires.pop(peer, None)
        for peer in self.peers:
            assert self.client.owed(peer) <= MAX_WINDOW_BYTES + SIZE

    def answer(self, peer: PeerId, message: Message) -> None:
        kind, wire = self.peers[peer], self.wires.setdefault(peer, [])
        at = max([self.now, *(when for when, _ in wire)])
        for entry in message.entries:
            number = int.from_bytes(entry.cid[4:], "big")
            if entry.cancel:
                self.wires[peer] = wire = [w for w in wire if all(cid != entry.cid for cid, _ in w[1].blocks)]
            elif kind == "corrupt":
                wire.append((at + 0.01, c.Arrived(peer, [(numbered_cid(1 << 40), bytes(SIZE))])))
            elif kind == "half" and number % 2:
                wire.append((at + 0.01, c.Arrived(peer, [], [(entry.cid, PresenceType.DONT_HAVE)])))
            elif kind != "mute":
                at += 1.5 if kind == "slow" else 0.01
                wire.append((at, c.Arrived(peer, [(entry.cid, bytes(SIZE))])))

    def step(self) -> None:
        """The next thing that happens: a delivery, a deadline, or trouble."""
        if self.rng.random() < 0.03:
            peer = self.rng.choice(sorted(set(self.peers) - {"sure"}))
            if peer in self.up:
                self.up.discard(peer)
                self.wires.pop(peer, None)
                self.give(c.PeerDown(peer))
            elif self.peers[peer] != "corrupt":
                self.up.add(peer)
                self.give(c.PeerUp(peer))
            return
        first: Any = min(((w[0][0], peer) for peer, w in self.wires.items() if w), default=None)
        deadline = self.client.deadline
        if first is not None and (deadline is None or first[0] <= deadline):
            self.now = max(self.now, first[0])
            self.give(self.wires[first[1]].pop(0)[1])
        else:
            assert deadline is not None, "blocks are missing and nobody will wake the client"
            self.now = max(self.now, deadline)
            self.give(c.Tick())


@given(st.integers(0, 1 << 32), st.integers(1, 60))
@settings(max_examples=60)
def test_every_block_comes_once_whatever_the_peers_do(seed: int, count: int) -> None:
    world = World(seed, count)
    world.give(c.Offer(1, tuple(world.peers)))
    world.give(c.Want(1, {numbered_cid(i): SIZE for i in range(count)}))
    for peer in world.peers:
        world.up.add(peer)
        world.give(c.PeerUp(peer))
    for _ in range(5000):
        if len(world.got) == count:
            break
        world.step()
    assert len(world.got) == count
    for peer in world.peers:
        assert world.client.owed(peer) == 0
    world.give(c.Close(1))


@given(st.integers(0, 1 << 32))
@settings(max_examples=40)
def test_server_answers_every_open_wish_once(seed: int) -> None:
    rng = random.Random(seed)
    held = {numbered_cid(i): rng.choice([10, 2000, 1 << 20]) for i in range(30)}
    server = Server(held.get)
    open_wishes: dict[tuple[PeerId, bytes], WantType] = {}
    peers = [PeerId("a"), PeerId("b"), PeerId("c")]
    under_way: list[PeerId] = []

    def answer() -> bool:
        """Whether there was one; what is in it was wished for."""
        answer = server.next()
        if answer is None:
            return False
        under_way.append(answer.peer)
        assert answer.blocks or answer.presences
        assert answer.size == sum(held[cid] for cid in answer.blocks)
        for cid in (*answer.blocks, *(cid for cid, _ in answer.presences)):
            assert open_wishes.pop((answer.peer, cid), None) is not None
        return True

    for _ in range(300):
        peer = rng.choice(peers)
        choice = rng.random()
        if choice < 0.5:
            entry = Entry(
                cid=numbered_cid(rng.randrange(40)),
                priority=rng.randrange(3),
                cancel=rng.random() < 0.2,
                want_type=rng.choice(list(WantType)),
            )
            server.handle(peer, Message(entries=(entry,)))
            open_wishes.pop((peer, entry.cid), None)
            if not entry.cancel:
                open_wishes[peer, entry.cid] = entry.want_type
        elif under_way and choice < 0.7:
            server.done(under_way.pop())
        else:
            answer()
    while under_way or answer():
        server.done(under_way.pop())
    assert all(cid not in held for _, cid in open_wishes)
    assert all(server.waiting(peer) == 0 for peer in peers)
    assert len(open_wishes) < MAX_WANTS


MIB = 1 << 20
RAW = bytes((1, 0x55, 0x12, 32))
CALLS_PER_ITEM = 40  # of an entry, a presence, a block with all its fields
MOST_CALLS = CALLS_PER_ITEM * MAX_ENTRIES
MOST_BYTES = 12 * MIB


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def filled(piece: bytes, before: bytes = b"") -> bytes:
    """As many pieces as a message may hold."""
    return before + piece * ((MAX_MESSAGE_BYTES - len(before) - 16) // len(piece))


ENTRY = field(1, b"\x0a\x01a")
FLOODS = {
    "entries": field(1, filled(ENTRY)),
    "wantlists of one entry": filled(field(1, ENTRY)),
    "empty wantlists": filled(field(1, b"")),
    "flags of one wantlist": field(1, filled(b"\x10\x01")),
    "unknown fields": filled(b"\x78\x01"),
    "unknown fields of bytes": filled(b"\x7a\x00"),
    "unknown fields in a wantlist": field(1, filled(b"\x78\x01")),
    "CIDs of one entry": field(1, field(1, filled(b"\x0a\x01a"))),
    "priorities of one entry": field(1, field(1, filled(b"\x10\x01", b"\x0a\x01a"))),
    "prefixes of one block": field(3, filled(b"\x0a\x01a")),
    "unknown fields of one block": field(3, filled(b"\x78\x01")),
    "types of one presence": field(4, filled(b"\x10\x01", b"\x0a\x01a")),
    "presences": filled(field(4, b"\x0a\x01a")),
    "empty blocks": filled(field(3, b"\x0a\x01a")),
    "pending bytes": filled(b"\x28\x01"),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_message_full_of_small_things_is_refused_early(flood: str) -> None:
    data = FLOODS[flood]
    assert MAX_MESSAGE_BYTES - 64 < len(data) <= MAX_MESSAGE_BYTES
    spent = cost(lambda: decode(data), RemoteProtocolError)
    assert spent.refused and spent.calls < MOST_CALLS and spent.peak < MOST_BYTES


def test_the_largest_messages_that_are_accepted_stay_within_the_bounds() -> None:
    entry = Entry(cid=numbered_cid(1), priority=-1, cancel=True, want_type=WantType.HAVE, send_dont_have=True)
    for message in (
        Message(entries=(entry,) * MAX_ENTRIES),
        Message(presences=(Presence(cid=numbered_cid(1), type=PresenceType.DONT_HAVE),) * MAX_ENTRIES),
        Message(blocks=(Block(prefix=RAW, data=bytes(MAX_BLOCK_BYTES)),)),
    ):
        data = encode(message)
        spent = cost(lambda data=data: decode(data), RemoteProtocolError)  # type: ignore[misc]
        assert spent.result == message and spent.calls < MOST_CALLS and spent.peak < MOST_BYTES


@pytest.mark.parametrize("size", HUGE_NUMBERS)
@pytest.mark.parametrize("where", ["message", "wantlist", "entry", "payload", "data", "presence", "cid"])
def test_a_length_that_lies(where: str, size: int) -> None:
    head = {
        "message": b"",
        "wantlist": b"\x0a",
        "entry": b"\x0a\x20\x0a",
        "payload": b"\x1a",
        "data": b"\x1a\x20\x0a\x04\x01\x55\x12\x20\x12",
        "presence": b"\x22",
        "cid": b"\x22\x20\x0a",
    }[where]
    data = head + varint(size) + bytes(5)
    if where == "message":
        spent = cost(lambda: list(MessageReader().feed(data)), RemoteProtocolError)
        assert spent.refused or (size < MAX_MESSAGE_BYTES and spent.result == [])
    else:
        spent = cost(lambda: decode(data), RemoteProtocolError)
        assert spent.refused
    assert spent.calls < 100 and spent.peak < MIB


@given(mutated(st.lists(BITSWAP, max_size=3).map(lambda many: b"".join(field(0, encode(m))[1:] for m in many))))
@settings(max_examples=100)
def test_an_injured_stream_holds_one_message_at_most(data: bytes) -> None:
    reader = MessageReader()
    spent = cost(lambda: [decode(raw) for raw in reader.feed(data)], RemoteProtocolError)
    assert spent.peak < MAX_MESSAGE_BYTES + MIB + 1000 * len(data)


def test_empty_messages_without_end_are_refused() -> None:
    reader = MessageReader()
    spent = cost(lambda: list(reader.feed(bytes(MIB))), RemoteProtocolError)
    assert spent.refused and spent.calls < 20_000
    assert list(MessageReader().feed(bytes(20) + b"\x02\x28\x01" + bytes(20))) == [b"\x28\x01"]


NO_SHA2_256 = {
    "identity": b"\x01\x55\x00\x7f",
    "identity of 256 MiB": b"\x01\x55\x00\xff\xff\xff\x7f",
    "what a CIDv0 begins with": b"\x12\x20",
    "version 0 of a raw block": b"\x00\x55\x12\x20",
    "the length of sha2-512": b"\x01\x55\x12\x40",
    "zeros": bytes(40),
}


@pytest.mark.parametrize("prefix", NO_SHA2_256.values(), ids=NO_SHA2_256.keys())
def test_a_block_under_a_hash_that_is_not_sha2_256_is_never_taken(prefix: bytes) -> None:
    data = encode(Message(blocks=(Block(prefix=prefix, data=b"x" * 100),)))
    (block,) = decode(data).blocks
    assert block.cid() is None
    client = c.Client()
    client.handle(c.PeerUp(PeerId("a")), 0.0)
    client.handle(c.Offer(1, (PeerId("a"),)), 0.0)
    client.handle(c.Want(1, {numbered_cid(1): 100}), 0.0)
    effects = client.handle(c.Arrived(PeerId("a"), [(block.cid(), block.data)]), 0.1)
    assert [type(effect) for effect in effects] == [c.Banned]


def big_fetch(blocks: int) -> tuple[c.Client, PeerId]:
    """A client that fetches a large file from a peer and a slower one."""
    client, peer = c.Client(), PeerId("hostile")
    client.handle(c.PeerUp(peer), 0.0)
    client.handle(c.Offer(1, (peer,)), 0.0)
    client.handle(c.Want(1, {numbered_cid(number): MIB for number in range(blocks)}), 0.0)
    return client, peer


@pytest.mark.parametrize("kind", list(PresenceType))
def test_a_flood_of_presences_costs_the_client_little(kind: PresenceType) -> None:
    client, peer = big_fetch(MAX_ENTRIES)
    flood = [(numbered_cid(number), kind) for number in range(MAX_ENTRIES)]
    spent = cost(lambda: [client.handle(c.Arrived(peer, [], flood), t / 10) for t in range(5)], RemoteProtocolError)
    assert spent.calls < 5 * 5 * MAX_ENTRIES and spent.peak < 8 * MIB
    assert len(client._peers[peer].lacks) <= 2 * MAX_LACKS
    after = cost(lambda: client.handle(c.Tick(), 1.0), RemoteProtocolError)
    assert after.calls < 2000


def test_a_peer_that_lacks_what_it_was_asked_for_again_and_again() -> None:
    """A queue of many blocks must not be copied whenever one of them goes back into it."""
    client, peer = big_fetch(100_000)
    spent = cost(lambda: _lack(client, peer, 50), RemoteProtocolError)
    assert spent.calls < 10_000 and spent.peak < MIB


def _lack(client: c.Client, peer: PeerId, times: int) -> None:
    owed = list(client._peers[peer].owes)
    for step in range(times):
        out = client.handle(c.Arrived(peer, [], [(name, PresenceType.DONT_HAVE) for name in owed]), step * 4.0)
        owed = [entry.cid for effect in out if isinstance(effect, c.Send) for entry in effect.message.entries]


@given(st.lists(st.integers(0, 1 << 63), max_size=40), st.integers(-(1 << 31), (1 << 31) - 1))
@settings(max_examples=30)
def test_pending_bytes_may_say_anything(sizes: list[int], pending: int) -> None:
    data = b"".join(b"\x28" + varint(size) for size in sizes) + b"\x28" + varint(pending & (1 << 64) - 1)
    spent = cost(lambda: decode(data), RemoteProtocolError)
    assert spent.refused or 0 <= spent.result.pending_bytes < 1 << 31


def test_a_wantlist_of_100_000_in_many_messages_costs_the_server_little() -> None:
    asked = 0

    def size_of(_: bytes) -> int | None:
        nonlocal asked
        asked += 1
        return None

    server, peer = Server(size_of), PeerId("hostile")

    def flood() -> None:
        for start in range(0, 100_000, 10_000):
            entries = tuple(Entry(cid=numbered_cid(n), send_dont_have=True) for n in range(start, start + 10_000))
            server.handle(peer, Message(entries=entries))

    spent = cost(flood, RemoteProtocolError)
    assert asked <= MAX_WANTS and spent.peak < 16 * MIB
    assert len(server._peers[peer].wants) <= MAX_WANTS
    assert len(server._peers[peer].presences) <= MAX_PRESENCES


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans(), st.booleans(), st.booleans()), max_size=200))
@settings(max_examples=40)
def test_want_and_cancel_in_any_order_leave_no_debris(steps: list[tuple[int, bool, bool, bool]]) -> None:
    server, peer = Server(lambda name: MIB if name[-1] % 2 else None), PeerId("hostile")
    for number, cancel, full, have in steps:
        kind = WantType.HAVE if have else WantType.BLOCK
        server.handle(
            peer, Message(entries=(Entry(cid=numbered_cid(number), cancel=cancel, want_type=kind),), full=full)
        )
    server.handle(peer, Message(full=True))
    assert server.waiting(peer) == 0 and server.next() is None
    assert peer not in server._peers
