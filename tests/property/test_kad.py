"""The DHT under random messages, damaged bytes and random answers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, base58_encode
from protocols.kad.lookup import (
    ALPHA,
    LOOKUP_S,
    MAX_ASKED,
    MAX_CANDIDATES,
    MAX_FOUND,
    MAX_UNDER_WAY,
    Answered,
    Ask,
    Begin,
    Done,
    Failed,
    Found,
    K,
    Lookup,
    Tick,
)
from protocols.kad.messages import (
    MAX_MESSAGE_BYTES,
    Kind,
    Message,
    MessageReader,
    Peer,
    decode,
    encode,
    frame,
    place,
    place_of,
)
from tests.wire import damaged

ids = st.one_of(
    st.binary(min_size=32, max_size=32).map(lambda b: b"\x12\x20" + b),
    st.binary(min_size=32, max_size=32).map(lambda b: b"\x00\x24\x08\x01\x12\x20" + b),
).map(lambda data: PeerId(base58_encode(data)))
few_ids = st.integers(0, 60).map(lambda n: PeerId(base58_encode(b"\x12\x20" + n.to_bytes(32, "big"))))
ports = st.integers(1, 65535)
addresses = st.one_of(
    st.builds("/ip4/{}/tcp/{}".format, st.ip_addresses(v=4), ports),
    st.builds("/ip6/{}/tcp/{}".format, st.ip_addresses(v=6), ports),
    st.builds("/dns4/{}/tcp/{}".format, st.from_regex(r"[a-z0-9]{1,20}(\.[a-z]{2,5})?", fullmatch=True), ports),
)


def peers(names: st.SearchStrategy[PeerId]) -> st.SearchStrategy[tuple[Peer, ...]]:
    one = st.builds(Peer, names, st.lists(addresses, max_size=3, unique=True).map(tuple))
    return st.lists(one, max_size=4, unique_by=lambda peer: peer.id).map(tuple)


messages = st.builds(
    Message, kind=st.sampled_from(Kind), key=st.binary(max_size=80), closer=peers(ids), providers=peers(ids)
)
US = PeerId(base58_encode(b"\x12\x20" + bytes([255] * 32)))
KEY = b"\x12\x20" + bytes([1] * 32)


@given(messages)
@settings(max_examples=150, deadline=None)
def test_messages_survive_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@given(messages, st.lists(st.integers(1, 50), max_size=20))
@settings(max_examples=60, deadline=None)
def test_framing_is_independent_of_the_pieces(message: Message, steps: list[int]) -> None:
    wire = frame(message) * 3
    reader, got, at = MessageReader(), [], 0
    for step in (*steps, len(wire)):
        got += [decode(raw) for raw in reader.feed(wire[at : at + step])]
        at += step
    assert got == [message] * 3


@given(messages)
@settings(max_examples=8, deadline=None)
def test_damage_is_refused_or_is_another_valid_message(message: Message) -> None:
    for data in damaged(encode(message)):
        try:
            again = decode(data)
        except RemoteProtocolError as error:
            assert len(str(error)) < 1000
            continue
        assert decode(encode(again)) == again


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_random_bytes(data: bytes) -> None:
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_random_streams_hold_little(data: bytes) -> None:
    reader = MessageReader()
    try:
        for raw in reader.feed(data):
            assert len(raw) <= MAX_MESSAGE_BYTES
    except RemoteProtocolError:
        return
    assert len(reader._buffer) <= len(data)


@given(peers(few_ids), st.data(), st.sampled_from((Kind.FIND_NODE, Kind.GET_PROVIDERS)))
@settings(max_examples=120, deadline=None)
def test_any_walk_ends_within_its_limits(seeds: tuple[Peer, ...], data: st.DataObject, kind: Kind) -> None:
    """Any answers, failures, silence and passing of time, in any order."""
    walk = Lookup(kind, KEY, US, 0.0)
    now, asked, found = 0.0, [], []
    under_way: list[PeerId] = []
    done: list[Done] = []

    def take(effects: tuple[object, ...]) -> None:
        for effect in effects:
            if isinstance(effect, Ask):
                asked.append(effect.peer.id)
                under_way.append(effect.peer.id)
                assert effect.peer.addresses and effect.peer.id != US
            elif isinstance(effect, Found):
                found.append(effect.provider.id)
            elif isinstance(effect, Done):
                done.append(effect)

    take(walk.handle(Begin(seeds), now))
    assert len(under_way) <= ALPHA
    while not walk.over:
        assert walk.deadline is not None and now <= walk.deadline <= LOOKUP_S
        assert len(under_way) <= MAX_UNDER_WAY and len(walk._candidates) <= MAX_CANDIDATES
        what = data.draw(st.sampled_from(("answer", "fail", "wait")))
        if what == "wait" or not under_way:
            now = walk.deadline
            take(walk.handle(Tick(), now))
            continue
        one = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        if what == "fail":
            take(walk.handle(Failed(one), now))
        else:
            take(walk.handle(Answered(one, data.draw(peers(few_ids)), data.draw(peers(few_ids))), now))
    assert len(done) == 1 and walk.deadline is None
    assert len(set(asked)) == len(asked) <= MAX_ASKED
    assert len(set(found)) <= MAX_FOUND
    distances = [place_of(peer.id) ^ place(KEY) for peer in done[0].closest]
    assert distances == sorted(distances) and len(distances) <= K
