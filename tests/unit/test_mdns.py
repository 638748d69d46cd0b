"""Who is on the local network: packets, hints, and machines on a wire in virtual time."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.secret import SecretBox

from protocols.codec import encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.mdns import dns
from protocols.mdns.machine import (
    ANSWERS_S,
    ASK_S,
    MAX_PEERS,
    PACKETS_PER_S,
    RENAME_S,
    TTL_S,
    Allowance,
    Discovery,
)
from protocols.mdns.messages import KEYS, MAX_ADDRESSES, NONCE_BYTES, PLAIN_BYTES, SERVICE, Hint, Seal
from tests.adverts import peer_of
from tests.vectors import Case, hold

SECRET, OTHER_SECRET = bytes(range(32)), bytes(32)
SEAL = Seal(SECRET)
NONCE = bytes(NONCE_BYTES)


def node(number: int, *, secret: bytes = SECRET, seed: int = 0) -> Discovery:
    rng = random.Random(seed * 1000 + number)
    return Discovery(peer_of(number), Seal(secret), rng.randbytes, rng.random)


def address(number: int) -> str:
    return f"/ip4/192.0.2.{number}/tcp/4331"


def owned(number: int) -> str:
    return f"{address(number)}/p2p/{peer_of(number)}"


class Wire:
    """Machines on one network; every packet reaches all at once, its sender too."""

    def __init__(self, *nodes: Discovery) -> None:
        self.nodes = nodes
        self.now = 0.0
        self.packets: list[tuple[float, bytes]] = []

    def run(self, until: float) -> None:
        while (when := min(one.deadline for one in self.nodes)) <= until:
            self.now = max(self.now, when)
            for one in self.nodes:
                if one.deadline <= self.now:
                    for packet in one.tick(self.now):
                        self.packets.append((self.now, packet))
                        for other in self.nodes:
                            other.receive(packet, self.now)
        self.now = until


def answers(packets: list[tuple[float, bytes]]) -> Iterator[tuple[float, dns.Packet]]:
    for when, data in packets:
        packet = dns.parse(data)
        if packet.texts:
            yield when, packet


def test_two_find_each_other_whoever_comes_first() -> None:
    first, second = node(1), node(2)
    first.begin((owned(1),), 0.0)
    wire = Wire(first, second)
    wire.run(10.0)
    second.begin((owned(2),), wire.now)
    wire.run(10.2)
    assert first.found(wire.now) == {peer_of(2): (owned(2),)}
    assert second.found(wire.now) == {peer_of(1): (owned(1),)}


def test_new_addresses_are_told_at_once_although_nobody_asks() -> None:
    first, second = node(1), node(2)
    wire = Wire(first, second)
    first.begin((owned(1),), 0.0)
    second.begin((owned(2),), 0.0)
    wire.run(60.0)
    second.begin((f"/ip4/198.51.100.9/tcp/4331/p2p/{peer_of(2)}",), wire.now)
    wire.run(60.1)
    assert first.found(wire.now)[peer_of(2)] == (f"/ip4/198.51.100.9/tcp/4331/p2p/{peer_of(2)}",)


def test_a_stranger_reads_nothing_and_is_not_read() -> None:
    ours, theirs = node(1), node(2, secret=OTHER_SECRET)
    wire = Wire(ours, theirs)
    for number, one in enumerate(wire.nodes, 1):
        one.begin((owned(number),), 0.0)
    wire.run(30.0)
    assert not ours.found(wire.now) and not theirs.found(wire.now)
    for _, packet in wire.packets:
        for word in (peer_of(1), address(1), "192.0.2", "4331", SECRET.hex()[:16]):
            assert word.encode() not in packet
        assert bytes((192, 0, 2, 1)) not in packet


def test_nothing_that_a_stranger_sees_comes_again_on_another_day_or_tells_how_many_addresses_there_are() -> None:
    one = node(1)
    wire = Wire(one)
    one.begin((owned(1),), 0.0)
    wire.run(100.0)
    one.begin(tuple(f"/ip6/2001:db8::{number}/tcp/4331/p2p/{peer_of(1)}" for number in range(8)), RENAME_S + 100)
    wire.run(RENAME_S + 200)
    again = node(1, seed=7)  # after a restart
    again.begin((owned(1),), 0.0)
    seen = [packet for _, packet in answers(wire.packets)]
    seen.append(dns.parse(again.tick(0.0)[1]))
    names = {name for packet in seen for name, _ in packet.texts}
    boxes = [strings for packet in seen for _, strings in packet.texts]
    assert len(names) == 3, "a name for each hour, and for each start"
    assert len({tuple(map(len, strings)) for strings in boxes}) == 1
    pieces = [strings[k][start : start + 8] for strings in boxes for k in range(3) for start in range(3, 170, 8)]
    assert len(set(pieces)) == len(pieces)


def test_a_node_without_an_address_says_nothing() -> None:
    one = node(1)
    wire = Wire(one)
    one.begin((), 0.0)
    one.receive(dns.query(SERVICE), 1.0)
    wire.run(1000.0)
    assert wire.packets == []


def test_a_large_network_stays_quiet() -> None:
    """Everybody hears every answer, so that one question serves all."""
    nodes = [node(number) for number in range(1, 51)]
    wire = Wire(*nodes)
    for number, one in enumerate(nodes, 1):
        one.begin((owned(number),), 0.0)
        one.alone(False, 0.0)
    wire.run(60.0)
    assert all(len(one.found(wire.now)) == 49 for one in nodes)
    wire.packets.clear()
    wire.run(60.0 + 3600)
    assert len(wire.packets) / len(nodes) < 3600 / (ASK_S * 0.8) * 1.3


def test_a_flood_of_questions_gets_an_answer_a_second() -> None:
    one = node(1)
    wire = Wire(one)
    one.begin((owned(1),), 0.0)
    wire.run(10.0)
    wire.packets.clear()
    while wire.now < 20.0:
        for _ in range(50):
            one.receive(dns.query(SERVICE), wire.now)
        wire.run(wire.now + 0.05)
    assert len(wire.packets) <= 10 / ANSWERS_S + 1


def test_a_flood_of_answers_costs_a_bounded_number_of_peers_and_boxes() -> None:
    one = node(1)
    one.begin((owned(1),), 0.0)
    rng = random.Random(1)
    for number in range(2, 2 + 2 * MAX_PEERS):
        strings = SEAL.seal(Hint(peer=peer_of(number), addresses=(address(1),)), rng.randbytes(NONCE_BYTES))
        packet = dns.response(SERVICE, f"n{number}.{SERVICE}", strings, TTL_S)
        one.receive(packet, float(number))
        one.receive(packet, float(number))
    assert len(one._heard) == MAX_PEERS
    allowed = Allowance(PACKETS_PER_S)
    assert sum(allowed.take(1.0) for _ in range(10_000)) == PACKETS_PER_S


def test_what_was_heard_is_forgotten() -> None:
    one = node(1)
    one.receive(packet_of(Hint(peer=peer_of(2), addresses=(address(2),))), 5.0)
    assert one.found(5.0 + TTL_S - 1)
    assert not one.found(5.0 + TTL_S)


def packet_of(hint: Hint) -> bytes:
    return dns.response(SERVICE, f"x.{SERVICE}", SEAL.seal(hint, NONCE), TTL_S)


def packet_with(plain: bytes) -> bytes:
    sealed = bytes(SEAL._box.encrypt(plain, NONCE))
    strings = tuple(key + sealed[start : start + 250] for key, start in zip(KEYS, (0, 250, 500), strict=True))
    return dns.response(SERVICE, f"x.{SERVICE}", strings, TTL_S)


@pytest.mark.parametrize(
    "hint",
    [
        Hint(peer="nobody", addresses=(address(2),)),
        Hint(peer=peer_of(2), addresses=(owned(3),)),
        Hint(peer=peer_of(2), addresses=("/ip4/192.0.2.999/tcp/1",)),
        Hint(peer=peer_of(2), addresses=("192.0.2.1:4331",)),
    ],
)
def test_a_member_that_tells_nonsense_is_named(hint: Hint) -> None:
    one = node(1)
    with pytest.raises(RemoteProtocolError):
        one.receive(packet_of(hint), 0.0)
    assert not one.found(0.0)


def test_a_hint_is_padded_with_nothing() -> None:
    plain = encode(Hint(peer=peer_of(2), addresses=()))
    body = len(plain).to_bytes(2, "big") + plain
    assert SEAL.open(dns.parse(packet_with(body.ljust(PLAIN_BYTES, b"\x00"))).texts[0][1]) is not None
    for wrong in (body.ljust(PLAIN_BYTES, b"x"), b"\xff\xff" + body[2:].ljust(PLAIN_BYTES - 2, b"\x00")):
        with pytest.raises(RemoteProtocolError):
            node(1).receive(packet_with(wrong), 0.0)


def test_addresses_that_find_no_room_are_left_out() -> None:
    long = tuple(f"/dns4/{'a' * 60}{number}.example/tcp/4331" for number in range(MAX_ADDRESSES))
    hint = SEAL.open(SEAL.seal(Hint(peer=peer_of(1), addresses=long), NONCE))
    assert hint is not None and 4 <= len(hint.addresses) < MAX_ADDRESSES
    assert hint.addresses == long[: len(hint.addresses)]


# ---------------------------------------------------------------- packets


def test_what_is_written_is_read() -> None:
    assert dns.parse(dns.query(SERVICE)) == dns.Packet(questions=((SERVICE, dns.PTR),))
    packet = dns.parse(dns.response(SERVICE, f"abc.{SERVICE}", (b"m0=x", b""), 120))
    assert packet.pointers == ((SERVICE, f"abc.{SERVICE}"),)
    assert packet.texts == ((f"abc.{SERVICE}", (b"m0=x", b"")),)


def test_compressed_names_of_others_are_read() -> None:
    question = dns.query(SERVICE)[12:-4]
    record = struct.pack(">2HIH", dns.PTR, dns.IN, 120, 6) + b"\x03abc\xc0\x0c"
    packet = dns.parse(struct.pack(">6H", 0, dns.RESPONSE, 0, 1, 0, 0) + question + record)
    assert packet.pointers == ((SERVICE, f"abc.{SERVICE}"),)


@pytest.mark.parametrize(
    "name",
    [
        b"\xc0\x0c",
        b"\xc0\xff",
        b"\x01a\xc0\x0c",
        b"\x40" + b"a" * 64,
        b"\x3f" + b"a" * 10,
        (b"\x3f" + b"a" * 63) * 5,
        b"\x80a",
    ],
)
def test_names_that_lead_nowhere_are_refused(name: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        dns.parse(struct.pack(">6H", 0, 0, 1, 0, 0, 0) + name + struct.pack(">2H", dns.PTR, dns.IN))


def test_limits_of_a_packet() -> None:
    with pytest.raises(RemoteProtocolError):
        dns.parse(bytes(dns.MAX_PACKET + 1))
    with pytest.raises(RemoteProtocolError):
        dns.parse(struct.pack(">6H", 0, 0, dns.MAX_RECORDS + 1, 0, 0, 0) + b"\x00" * 500)


@given(st.binary(max_size=400))
def test_any_bytes_raise_nothing_else(data: bytes) -> None:
    one = node(1)
    one.begin((owned(1),), 0.0)
    one.receive(data, 0.0)
    one.receive(struct.pack(">6H", 0, dns.RESPONSE, 0, 2, 0, 2) + data, 0.0)


@given(st.data())
def test_damaged_answers_raise_nothing_else(data: st.DataObject) -> None:
    packet = bytearray(packet_of(Hint(peer=peer_of(2), addresses=(address(2),))))
    for _ in range(data.draw(st.integers(1, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    one = node(1)
    one.receive(bytes(packet[: data.draw(st.integers(0, len(packet)))]), 0.0)
    assert set(one.found(0.0)) <= {peer_of(2)}


def read(data: bytes) -> Hint:
    (text,) = dns.parse(data).texts
    hint = SEAL.open(text[1])
    if hint is None:
        raise RemoteProtocolError("not of this network")
    one = node(1)
    one.receive(data, 0.0)
    return hint


def test_vectors() -> None:
    whole = Hint(peer=peer_of(2), addresses=(address(2), "/ip6/2001:db8::1/tcp/4331"))
    foreign = Seal(OTHER_SECRET).seal(whole, NONCE)
    long = encode(whole).ljust(PLAIN_BYTES - 2, b"x")
    hold(
        "mdns",
        [
            Case("a hint of two addresses", packet_of(whole), whole),
            Case(
                "a hint without addresses",
                packet_of(Hint(peer=peer_of(2), addresses=())),
                Hint(peer=peer_of(2), addresses=()),
            ),
            Case("of another network", dns.response(SERVICE, f"x.{SERVICE}", foreign, TTL_S)),
            Case("padded with something", packet_with(len(encode(whole)).to_bytes(2, "big") + long)),
            Case("an owner in an address", packet_of(Hint(peer=peer_of(2), addresses=(owned(2),)))),
            Case("no peer id", packet_of(Hint(peer="nobody", addresses=()))),
        ],
        read,
    )
    assert SecretBox.NONCE_SIZE == NONCE_BYTES
    assert PeerId(peer_of(2))


def test_a_member_that_was_away_while_the_secret_was_renewed_is_still_read() -> None:
    old, new = bytes(32), bytes(range(32))
    hint = Hint(peer=peer_of(1), addresses=("/ip4/192.0.2.1/tcp/4331",))
    from_before = Seal(old).seal(hint, bytes(24))
    assert Seal(new, [old]).open(from_before) == hint
    assert Seal(new).open(from_before) is None
    assert Seal(old).open(Seal(new, [old]).seal(hint, bytes(24))) is None, (
        "what we say is for those who have the new one"
    )
