"""Any blocks in any pieces, and hostile bytes: one kind of error, within bounded memory and work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.errors import ModelError
from meshnode.ipfs.car_import import import_car
from meshnode.store.blob_store import BlobStore
from protocols.car.machine import Reader
from protocols.car.messages import (
    MAX_HEADER_BYTES,
    MAX_SECTION_BYTES,
    Block,
    Header,
    encode_block,
    encode_header,
)
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, RAW
from tests.hostile import HUGE_NUMBERS, LONG_VARINTS, cost, mutated, varint
from tests.trees import block

PIECE = 97  # the most that is fed at once by `_read`


blocks = st.builds(
    lambda data, codec, old: block(data, codec, old=old and codec == DAG_PB),
    st.binary(max_size=300),
    st.sampled_from((RAW, DAG_PB, DAG_CBOR)),
    st.booleans(),
)
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
        assert 10 < len(str(error)) < 300 and str(error).isprintable()
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


MIB = 1 << 20


ROOT = block(b"\xa0", DAG_CBOR)
HEAD = encode_header(Header((ROOT.cid,)))


def count(data: bytes, piece: int = 1 << 16) -> int:
    """Read a CAR and keep nothing of it; how many blocks there were."""
    reader, found = Reader(), -1
    for at in range(0, len(data), piece):
        reader.feed(data[at : at + piece])
        while reader.next() is not None:
            found += 1
    reader.finish()
    return found


@pytest.mark.parametrize("length", [*HUGE_NUMBERS, MAX_HEADER_BYTES + 1, MAX_SECTION_BYTES + 1, 1 << 62, 1 << 70])
@pytest.mark.parametrize("before", [b"", HEAD], ids=["header", "section"])
def test_a_length_that_lies_is_refused_before_anything_is_kept(before: bytes, length: int) -> None:
    data = before + varint(length) + bytes(100)
    spent = cost(lambda: count(data), RemoteProtocolError)
    assert spent.refused and spent.calls < 60 and spent.peak < MIB


@pytest.mark.parametrize("length", LONG_VARINTS)
def test_lengths_in_another_spelling(length: bytes) -> None:
    for before in (b"", HEAD):
        assert cost(lambda before=before: count(before + length + bytes(9)), RemoteProtocolError).refused  # type: ignore[misc]


def test_a_header_that_never_ends_is_held_up_to_its_limit() -> None:
    reader = Reader()

    def feed() -> None:
        reader.feed(varint(MAX_HEADER_BYTES) + b"\xa2\x65roots\x99\xff\xff")
        while reader.next() is None:
            reader.feed(bytes(1000))

    spent = cost(feed, RemoteProtocolError)
    assert spent.refused and spent.calls < 100_000 and spent.peak < MIB


@pytest.mark.parametrize("head", [b"\x98\xff", b"\x99\xff\xff", b"\x9a\xff\xff\xff\xff", b"\x9b" + b"\xff" * 8])
def test_a_header_that_promises_roots_it_does_not_have(head: bytes) -> None:
    cbor = b"\xa2\x65roots" + head + b"\xd8\x2a\x58\x25\x00" + ROOT.cid + b"\x67version\x01"
    spent = cost(lambda: count(varint(len(cbor)) + cbor), RemoteProtocolError)
    assert spent.refused and spent.calls < 200 and spent.peak < MIB


TINY = {
    "empty raw blocks": encode_block(block(b"")),
    "empty blocks with a CIDv0": encode_block(block(b"", DAG_PB, old=True)),
    "the root again and again": encode_block(ROOT),
}


@pytest.mark.parametrize("kind", TINY)
def test_a_flood_of_tiny_sections_costs_the_same_for_each(kind: str) -> None:
    many = 20_000
    spent = cost(lambda: count(HEAD + TINY[kind] * many), RemoteProtocolError)
    assert spent.result == many
    assert spent.calls < 12 * many and spent.peak < 4 * MIB


@pytest.mark.parametrize(
    "section",
    [b"\0", b"\x01\x01", b"\x22" + b"\x12\x20" + bytes(31) + b"\0", varint(70) + b"\x01\x55\x00\x42" + bytes(66),
     varint(2 * MIB) + b"\x01\x55\x00" + varint(2 * MIB - 10) + bytes(2 * MIB - 3),
     varint(40) + b"\x12\x14" + bytes(38), varint(36) + b"\x01\x12\x20" + bytes(33), varint(37) + b"\x00" * 37,
     varint(45) + b"\x01" + b"\x80" * 8 + b"\x01\x12\x20" + bytes(33)],
    ids=["no bytes", "half a CID", "a CIDv0 of other bytes", "identity", "identity of 2 MiB", "a short hash",
         "a CIDv1 around a CIDv0", "zeros", "a codec of nine bytes"],
)  # fmt: skip
def test_sections_that_prove_nothing(section: bytes) -> None:
    data = HEAD + section * 3
    spent = cost(lambda: count(data), RemoteProtocolError)
    assert spent.refused and spent.calls < 2000 and spent.peak < 10 * MIB


ARCHIVES = st.builds(_car, headers, st.lists(blocks, max_size=4))


@given(mutated(ARCHIVES) | st.binary(max_size=400) | st.binary(max_size=400).map(lambda noise: HEAD + noise), cuts)
@settings(max_examples=300)
def test_injured_archives_are_refused_or_verified(data: bytes, pieces: list[int]) -> None:
    _survives(data, pieces)


# ------------------------------------------------------------ into the store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path / "content", 1 << 30)
    yield store
    store.close()


OTHER = b"".join(encode_block(block(number.to_bytes(4, "big"))) for number in range(20_000))
IMPORTS = {
    "nothing": b"",
    "a header alone": HEAD,
    "blocks that nobody asked for": HEAD + OTHER,
    "a manifest that is none": HEAD + encode_block(ROOT) + OTHER,
    "a manifest nested without end": b"",  # made below: its root is its hash
    "a manifest of 2 MiB": b"",
    "a root that is a file": encode_header(Header((block(b"x").cid,))) + encode_block(block(b"x")),
    "200 roots": encode_header(Header((ROOT.cid,) * 200)) + encode_block(ROOT),
    "a length at the end": HEAD + encode_block(ROOT) + b"\xff\xff\x7f",
}
for _name, _data in (("nested without end", b"\x81" * 10_000 + b"\x80"), ("of 2 MiB", bytes(2 * MIB))):
    _root = block(_data, DAG_CBOR)
    IMPORTS[f"a manifest {_name}"] = encode_header(Header((_root.cid,))) + encode_block(_root)


@pytest.mark.parametrize("kind", IMPORTS)
def test_an_archive_that_is_no_release_leaves_nothing_behind(store: BlobStore, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.car"
    path.write_bytes(IMPORTS[kind])
    spent = cost(lambda: import_car(store, path), ModelError)
    assert spent.refused and spent.peak < 16 * MIB and spent.calls < 1_000_000
    assert store.files() == frozenset() and store.pins() == {}


@given(
    data=st.one_of(st.binary(max_size=300), mutated(st.just(HEAD + encode_block(ROOT) + encode_block(block(b"x")))))
)
@settings(max_examples=60)
def test_any_file_is_imported_or_refused_with_a_sentence(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "x.car").write_bytes(data)
    store = BlobStore(folder / "content", 1 << 30)
    try:
        with pytest.raises(ModelError) as caught:
            import_car(store, folder / "x.car")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700
        assert store.files() == frozenset()
    finally:
        store.close()
