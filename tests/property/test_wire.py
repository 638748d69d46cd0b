"""Every wire format under the same attacks: any message comes back, and any other bytes are refused or canonical."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import codec
from protocols.advert.messages import Advert, Announcement
from protocols.bitswap import messages as bitswap
from protocols.codec import Union
from protocols.enginewire.messages import ANSWERS, REQUESTS
from protocols.errors import RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, base58_encode
from protocols.intent.messages import HOLDS
from protocols.kad import messages as kad
from protocols.membership import HELLO
from protocols.pipe.messages import PIPE
from protocols.sync.messages import SYNC
from protocols.unixfs import node as unixfs
from tests.hostile import mutated
from tests.unit.test_codec import THINGS
from tests.wire import damaged, messages, survives


@dataclass(frozen=True)
class Wire:
    messages: st.SearchStrategy[Any]
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    canonical: bool = True  # one message has one encoding: not so in protobuf


def union(of: Union[Any]) -> Wire:
    return Wire(st.one_of([messages(cls) for cls in of]), of.decode, of.encode)


def alone(cls: type[Any]) -> Wire:
    return Wire(messages(cls), lambda raw: codec.decode(cls, raw), codec.encode)


# ------------------------------------------------------------ the formats that are protobuf

_names = st.binary(min_size=1, max_size=40)
_entries = st.builds(
    bitswap.Entry,
    cid=_names,
    priority=st.integers(-(1 << 31), (1 << 31) - 1),
    cancel=st.booleans(),
    want_type=st.sampled_from(bitswap.WantType),
    send_dont_have=st.booleans(),
)
_blocks = st.builds(bitswap.Block, prefix=_names, data=st.binary(max_size=40))
_presences = st.builds(bitswap.Presence, cid=_names, type=st.sampled_from(bitswap.PresenceType))
BITSWAP = st.builds(
    bitswap.Message,
    entries=st.lists(_entries, max_size=4).map(tuple),
    full=st.booleans(),
    blocks=st.lists(_blocks, max_size=3).map(tuple),
    presences=st.lists(_presences, max_size=3).map(tuple),
    pending_bytes=st.integers(0, (1 << 31) - 1),
)

_ports = st.integers(1, 65535)
_addresses = st.one_of(
    st.builds("/ip4/{}/tcp/{}".format, st.ip_addresses(v=4), _ports),
    st.builds("/ip6/{}/tcp/{}".format, st.ip_addresses(v=6), _ports),
    st.builds("/dns4/{}/tcp/{}".format, st.from_regex(r"[a-z0-9]{1,20}(\.[a-z]{2,5})?", fullmatch=True), _ports),
)
_ids = st.builds(
    lambda head, key: PeerId(base58_encode(head + key)),
    st.sampled_from((b"\x12\x20", b"\x00\x24\x08\x01\x12\x20")),
    st.binary(min_size=32, max_size=32),
)


def peers(names: st.SearchStrategy[PeerId]) -> st.SearchStrategy[tuple[kad.Peer, ...]]:
    one = st.builds(kad.Peer, names, st.lists(_addresses, max_size=3, unique=True).map(tuple))
    return st.lists(one, max_size=4, unique_by=lambda peer: peer.id).map(tuple)


KAD = st.builds(
    kad.Message, kind=st.sampled_from(kad.Kind), key=st.binary(max_size=80), closer=peers(_ids), providers=peers(_ids)
)

_links = st.builds(
    lambda digest, size, more: unixfs.Link(bytes((1, 0x55, 0x12, 32)) + digest, size + more, size),
    st.binary(min_size=32, max_size=32),
    st.integers(1, 1 << 30),
    st.integers(0, 999),
)
_nodes = st.lists(_links, min_size=1, max_size=20).map(lambda items: unixfs.Node(tuple(items)))
NODES = (
    _nodes
    | _nodes.map(  # with CIDs of version 0
        lambda it: unixfs.Node(
            tuple(unixfs.Link(b"\x01\x70" + link.cid[2:], link.tsize, link.size) for link in it.links), old=True
        )
    )
)

WIRES = {
    "the codec's own": union(THINGS),
    "pipe": union(PIPE),
    "requests to an engine": union(REQUESTS),
    "answers of an engine": union(ANSWERS),
    "holds": union(HOLDS),
    "sync": union(SYNC),
    "hello": union(HELLO),
    "advert": alone(Advert),
    "head": alone(Announcement),
    "bitswap": Wire(BITSWAP, bitswap.decode, bitswap.encode, canonical=False),
    "kad": Wire(KAD, kad.decode, kad.encode, canonical=False),
    "nodes of files": Wire(NODES, unixfs.decode, unixfs.encode),
}
every_wire = pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)


def taken(wire: Wire, data: bytes) -> Any:
    """The message that bytes from outside are taken for, None when they are refused."""
    if wire.canonical:
        return wire.decode(data) if survives(data, wire.decode, wire.encode) else None
    try:
        message = wire.decode(data)
    except RemoteProtocolError as error:
        assert len(str(error)) < 1000
        return None
    assert wire.decode(wire.encode(message)) == message
    return message


@every_wire
@settings(max_examples=100)
@given(data=st.data())
def test_any_message_comes_back(wire: Wire, data: st.DataObject) -> None:
    message = data.draw(_encodable(wire))
    assert wire.decode(wire.encode(message)) == message


@every_wire
@settings(max_examples=15)
@given(data=st.data())
def test_damage_is_refused_or_is_another_message(wire: Wire, data: st.DataObject) -> None:
    message = data.draw(_encodable(wire))
    for bad in damaged(wire.encode(message)):
        assert taken(wire, bad) != message or not wire.canonical


@every_wire
@settings(max_examples=200)
@given(data=st.data())
def test_injured_and_random_bytes(wire: Wire, data: st.DataObject) -> None:
    bad = data.draw(st.binary(max_size=200) | mutated(_encodable(wire).map(wire.encode)))
    message = taken(wire, bad)
    if isinstance(message, bitswap.Message):
        assert all((name := block.cid()) is None or len(name) == 36 for block in message.blocks)


def _encodable(wire: Wire) -> st.SearchStrategy[Any]:
    """Without what is longer than the small limit of the codec's own union."""
    return (
        wire.messages.filter(lambda m: len(codec.encode(m)) < 90)
        if wire is WIRES["the codec's own"]
        else wire.messages
    )


# ------------------------------------------------------------ streams of messages


def frames(data: bytes) -> bytes:
    return pack(data[:3], data[3:])


STREAMS: dict[str, tuple[Callable[[], Any], st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[Any], Any]]] = {
    "frames": (FrameReader, st.binary(max_size=80), frames, lambda frame: frame.header + frame.body),
    "bitswap": (
        bitswap.MessageReader,
        BITSWAP.filter(lambda message: message != bitswap.Message()),  # of which readers say nothing
        lambda message: b"".join(bitswap.frame_parts(message)),
        bitswap.decode,
    ),
    "kad": (kad.MessageReader, KAD, kad.frame, kad.decode),
}


def in_pieces(wire: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = turn = 0
    while at < len(wire):
        size = sizes[turn % len(sizes)]
        yield wire[at : at + size]
        at, turn = at + size, turn + 1


@pytest.mark.parametrize("stream", STREAMS)
@settings(max_examples=100)
@given(data=st.data(), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_any_cut_of_a_stream_gives_the_same_messages(stream: str, data: st.DataObject, sizes: list[int]) -> None:
    reader, items, frame, read = STREAMS[stream]
    sent = data.draw(st.lists(items, max_size=6))
    made = reader()
    got = [read(raw) for piece in in_pieces(b"".join(map(frame, sent)), sizes) for raw in made.feed(piece)]
    assert got == sent
    assert not made.pending
    if sent and len(last := frame(sent[-1])) > 1:
        list(made.feed(last[:-1]))
        assert made.pending


@pytest.mark.parametrize("stream", STREAMS)
@settings(max_examples=100)
@given(data=st.data())
def test_an_injured_stream_is_refused_or_read(stream: str, data: st.DataObject) -> None:
    reader, items, frame, read = STREAMS[stream]
    whole = st.lists(items, max_size=3).map(lambda sent: b"".join(map(frame, sent)))
    with suppress(RemoteProtocolError):
        for raw in reader().feed(data.draw(mutated(whole) | st.binary(max_size=200))):
            read(raw)
