"""Any blocks in any pieces; every damage is refused by one kind of error, within bounded memory."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.car.machine import Reader
from protocols.car.messages import MAX_SECTION_BYTES, Block, Header, encode_block, encode_header
from protocols.errors import RemoteProtocolError
from protocols.protobuf import put_varint
from tests.wire import damaged

PIECE = 97  # the most that is fed at once below


def _block(codec: int, data: bytes, old: bool = False) -> Block:
    return Block(bytes((1, codec, 0x12, 32)) + hashlib.sha256(data).digest(), data, old and codec == 0x70)


blocks = st.builds(_block, st.sampled_from((0x55, 0x70, 0x71)), st.binary(max_size=300), st.booleans())
headers = st.lists(blocks, min_size=1, max_size=3).map(lambda items: Header(tuple(item.cid for item in items)))


def _car(header: Header, content: list[Block]) -> bytes:
    return encode_header(header) + b"".join(encode_block(item) for item in content)


def _read(data: bytes, pieces: list[int]) -> list[Header | Block]:
    reader, items, at, turn = Reader(), [], 0, 0
    while at < len(data):
        size = pieces[turn % len(pieces)]
        reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
        while (item := reader.next()) is not None:
            items.append(item)
        assert len(reader._buffer) <= 9 + MAX_SECTION_BYTES + PIECE
    reader.finish()
    return items


def _survives(data: bytes, pieces: list[int]) -> list[Header | Block] | None:
    """What is read; None if it is refused, which must be by a sentence of bounded length."""
    try:
        items = _read(data, pieces)
    except RemoteProtocolError as error:
        assert 10 < len(str(error)) < 300
        return None
    header, *rest = items
    assert isinstance(header, Header) and all(isinstance(item, Block) for item in rest)
    assert _car(header, rest) == data  # one archive has one encoding
    for item in rest:
        assert hashlib.sha256(item.data).digest() == item.cid[4:]
    return items


cuts = st.lists(st.integers(1, PIECE), min_size=1, max_size=20)


@given(headers, st.lists(blocks, max_size=8), cuts)
@settings(max_examples=100)
def test_round_trip_in_any_pieces(header: Header, content: list[Block], pieces: list[int]) -> None:
    assert _read(_car(header, content), pieces) == [header, *content]


@given(headers, st.lists(blocks, min_size=1, max_size=4), cuts, st.data())
@settings(max_examples=150)
def test_a_cut_or_a_flipped_bit(header: Header, content: list[Block], pieces: list[int], data: st.DataObject) -> None:
    whole = _car(header, content)
    ends = {len(encode_header(header))}
    for item in content:
        ends.add(max(ends) + len(encode_block(item)))
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert (_survives(whole[:cut], pieces) is not None) == (cut in ends)
    flipped = bytearray(whole)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    read = _survives(bytes(flipped), pieces)
    assert read != [header, *content]  # a root or a codec may have changed, never bytes under their hash


def test_every_damage_of_a_small_archive() -> None:
    small = _block(0x55, b"abc")
    for spoilt in damaged(_car(Header((small.cid,)), [small])):
        items = _survives(spoilt, [PIECE])
        assert items is None or all(item.data == b"abc" for item in items[1:] if isinstance(item, Block))


@given(st.binary(max_size=400), cuts, st.booleans())
@settings(max_examples=200)
def test_random_bytes(noise: bytes, pieces: list[int], behind_a_header: bool) -> None:
    before = encode_header(Header((_block(0x71, b"\xa0").cid,))) if behind_a_header else b""
    _survives(before + noise, pieces)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"\xa2\x65roots", b"\xa2\x65roots\x81\xd8\x2a\x58\x25\x00\x01", b"\xa1"]),
)
@settings(max_examples=150)
def test_headers_that_begin_well(noise: bytes, start: bytes) -> None:
    _survives(put_varint(len(start + noise)) + start + noise, [PIECE])
