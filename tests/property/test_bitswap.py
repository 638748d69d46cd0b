"""Bitswap under random messages, damaged bytes and random networks."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.bitswap import client as c
from protocols.bitswap.ledger import MAX_WINDOW_BYTES
from protocols.bitswap.messages import (
    Block,
    Entry,
    Message,
    MessageReader,
    Presence,
    PresenceType,
    WantType,
    decode,
    encode,
    frame_parts,
)
from protocols.bitswap.server import MAX_WANTS, Server
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from tests.wire import damaged, survives

cids = st.binary(min_size=1, max_size=40)
entries = st.builds(
    Entry,
    cid=cids,
    priority=st.integers(-(1 << 31), (1 << 31) - 1),
    cancel=st.booleans(),
    want_type=st.sampled_from(WantType),
    send_dont_have=st.booleans(),
)
messages = st.builds(
    Message,
    entries=st.lists(entries, max_size=4).map(tuple),
    full=st.booleans(),
    blocks=st.lists(
        st.builds(Block, prefix=st.binary(min_size=1, max_size=40), data=st.binary(max_size=40)), max_size=3
    ).map(tuple),
    presences=st.lists(st.builds(Presence, cid=cids, type=st.sampled_from(PresenceType)), max_size=3).map(tuple),
    pending_bytes=st.integers(0, (1 << 31) - 1),
)


@given(messages)
@settings(max_examples=150)
def test_messages_survive_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@given(messages, st.lists(st.integers(1, 50), max_size=20))
@settings(max_examples=80)
def test_framing_is_independent_of_the_pieces(message: Message, steps: list[int]) -> None:
    wire = b"".join(frame_parts(message)) * 3
    reader, got, at = MessageReader(), [], 0
    for step in (*steps, len(wire)):
        got += [decode(raw) for raw in reader.feed(wire[at : at + step])]
        at += step
    assert got == ([] if message == Message() else [message] * 3)


@given(messages)
@settings(max_examples=12)
def test_damage_is_refused_or_is_another_valid_message(message: Message) -> None:
    for data in damaged(encode(message)):
        try:
            again = decode(data)
        except RemoteProtocolError as error:
            assert len(str(error)) < 1000
            continue
        assert decode(encode(again)) == again


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes(data: bytes) -> None:
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    assert decode(encode(message)) == message
    for raw in MessageReader().feed(b"".join(frame_parts(message))):
        assert survives(bytes(raw), decode, encode)


SIZE = 1 << 18


def cid_of(number: int) -> bytes:
    return bytes((1, 0x55, 0x12, 32)) + number.to_bytes(32, "big")


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
                wire.append((at + 0.01, c.Arrived(peer, [(cid_of(1 << 40), bytes(SIZE))])))
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
    world.give(c.Want(1, {cid_of(i): SIZE for i in range(count)}))
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
    held = {cid_of(i): rng.choice([10, 2000, 1 << 20]) for i in range(30)}
    server = Server(held.get)
    open_wishes: dict[tuple[PeerId, bytes], WantType] = {}
    peers = [PeerId("a"), PeerId("b"), PeerId("c")]
    under_way: list[PeerId] = []
    for _ in range(300):
        peer = rng.choice(peers)
        choice = rng.random()
        if choice < 0.5:
            entry = Entry(
                cid=cid_of(rng.randrange(40)),
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
            answer = server.next()
            if answer is None:
                continue
            under_way.append(answer.peer)
            assert answer.blocks or answer.presences
            assert answer.size == sum(held[cid] for cid in answer.blocks)
            for cid in (*answer.blocks, *(cid for cid, _ in answer.presences)):
                assert open_wishes.pop((answer.peer, cid), None) is not None
    while under_way or (answer := server.next()) is not None:
        if under_way:
            server.done(under_way.pop())
            continue
        assert answer is not None
        under_way.append(answer.peer)
        for cid in (*answer.blocks, *(cid for cid, _ in answer.presences)):
            assert open_wishes.pop((answer.peer, cid), None) is not None
    assert all(cid not in held for _, cid in open_wishes)
    assert all(server.waiting(peer) == 0 for peer in peers)
    assert len(open_wishes) < MAX_WANTS
