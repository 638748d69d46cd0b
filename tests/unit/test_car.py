"""CAR files: what is written, what is refused and with which words; the vectors."""

from __future__ import annotations

import hashlib

import pytest

from protocols.car.machine import Reader
from protocols.car.messages import (
    MAX_BLOCK_BYTES,
    MAX_HEADER_BYTES,
    Block,
    Header,
    encode_block,
    encode_header,
    section_head,
)
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, RAW, cid_from_bytes
from protocols.protobuf import put_varint
from tests.vectors import Case, hold


def block(data: bytes, codec: int = RAW) -> Block:
    return Block(bytes((1, codec, 0x12, 32)) + hashlib.sha256(data).digest(), data)


def read(data: bytes, piece: int = 1 << 20) -> list[Header | Block]:
    """Everything in a CAR, fed in pieces of this size."""
    reader, items = Reader(), []
    for start in range(0, len(data), piece):
        reader.feed(data[start : start + piece])
        while (item := reader.next()) is not None:
            items.append(item)
    reader.finish()
    return items


HELLO, EMPTY, NODE, MANIFEST = block(b"hello\n"), block(b""), block(b"\x0a\x00", DAG_PB), block(b"\xa0", DAG_CBOR)
HEADER = Header((MANIFEST.cid,))
BLOCKS = [MANIFEST, NODE, HELLO, EMPTY]
WHOLE = encode_header(HEADER) + b"".join(encode_block(item) for item in BLOCKS)
HEAD = encode_header(HEADER)
LINK = b"\xd8\x2a\x58\x25\x00" + MANIFEST.cid
CARV2 = bytes.fromhex("0aa16776657273696f6e02")  # the pragma as its specification prints it


def headed(cbor: bytes) -> bytes:
    return put_varint(len(cbor)) + cbor


def section(cid: bytes, data: bytes) -> bytes:
    return put_varint(len(cid) + len(data)) + cid + data


REFUSED = {
    "an empty file": b"",
    "only a length": b"\x3a",
    "version 2": CARV2 + b"\0" * 40,
    "version 3": headed(b"\xa1\x67version\x03"),
    "version 2 with roots": headed(b"\xa2\x65roots\x81" + LINK + b"\x67version\x02"),
    "no roots": headed(b"\xa2\x65roots\x80\x67version\x01"),
    "keys in another order": headed(b"\xa2\x67version\x01\x65roots\x81" + LINK),
    "an array of indefinite length": headed(b"\xa2\x65roots\x9f" + LINK + b"\xff\x67version\x01"),
    "a count that is not in its shortest form": headed(b"\xa2\x65roots\x98\x01" + LINK + b"\x67version\x01"),
    "a root without the zero byte": headed(b"\xa2\x65roots\x81\xd8\x2a\x58\x24" + MANIFEST.cid + b"\x67version\x01"),
    "a root of version 0": headed(b"\xa2\x65roots\x81\xd8\x2a\x58\x23\x00\x12\x20" + bytes(32) + b"\x67version\x01"),
    "a third key in the header": headed(b"\xa3\x61a\x01\x65roots\x81" + LINK + b"\x67version\x01"),
    "bytes after the header's map": headed(b"\xa2\x65roots\x81" + LINK + b"\x67version\x01\x00"),
    "more roots stated than there are": headed(b"\xa2\x65roots\x82" + LINK + b"\x67version\x01"),
    "a header of no bytes": b"\0",
    "a header above the limit": put_varint(MAX_HEADER_BYTES + 1),
    "a block cut off": WHOLE[:-1],
    "a section of no bytes": HEAD + b"\0",
    "null padding at the end": WHOLE + b"\0" * 8,
    "garbage at the end": WHOLE + b"garbage",
    "a length in two bytes that needs one": HEAD + b"\xa4\x00" + EMPTY.cid,
    "a length of ten bytes": HEAD + b"\x80" * 9 + b"\x01",
    "a block above the limit": HEAD + put_varint(36 + MAX_BLOCK_BYTES + 1),
    "a section shorter than a CID": HEAD + section(HELLO.cid[:35], b""),
    "a CIDv0": HEAD + section(b"\x12\x20" + hashlib.sha256(b"x").digest(), b"x"),
    "a CID of version 2": HEAD + section(b"\x02" + HELLO.cid[1:], HELLO.data),
    "an unknown codec": HEAD + section(b"\x01\x51" + HELLO.cid[2:], HELLO.data),
    "an identity hash": HEAD + section(b"\x01\x55\x00\x06hello\n", b"hello\n"),
    "sha2-512": HEAD + section(b"\x01\x55\x13\x40" + hashlib.sha512(b"hello\n").digest(), b"hello\n"),
    "a sha2-256 that is cut to 20 bytes": HEAD + section(b"\x01\x55\x12\x14" + HELLO.cid[4:24], b"hello\n" * 9),
    "a damaged block": HEAD + section(HELLO.cid, b"Hello\n"),
}


def test_vectors() -> None:
    cases = [
        Case("one block", HEAD + encode_block(MANIFEST), [HEADER, MANIFEST]),
        Case("all codecs, an empty block", WHOLE, [HEADER, *BLOCKS]),
        Case("no blocks", HEAD, [HEADER]),
        Case("two roots", encode_header(Header((MANIFEST.cid, HELLO.cid))), [Header((MANIFEST.cid, HELLO.cid))]),
        *(Case(name, data) for name, data in REFUSED.items()),
    ]
    hold("car", cases, read)


def test_the_header_is_what_other_tools_write() -> None:
    # The first bytes of carv1-basic.car, the fixture of the specification.
    roots = (
        bytes.fromhex("01711220f88bc853804cf294fe417e4fa83028689fcdb1b1592c5102e1474dbc200fab8b"),
        bytes.fromhex("0171122069ea0740f9807a28f4d932c62e7c1c83be055e55072c90266ab3e79df63a365b"),
    )
    expected = "63a265726f6f747382" + "".join("d82a582500" + cid.hex() for cid in roots) + "6776657273696f6e01"
    assert encode_header(Header(roots)).hex() == expected
    assert cid_from_bytes(roots[0]) == "bafyreihyrpefhacm6kkp4ql6j6udakdit7g3dmkzfriqfykhjw6cad5lrm"


@pytest.mark.parametrize("piece", [1, 2, 7, 36, 100, 1 << 20])
def test_pieces_do_not_matter(piece: int) -> None:
    assert read(WHOLE, piece) == [HEADER, *BLOCKS]


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, piece: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read(REFUSED[what], piece)
    assert "(at byte " in str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("version 2", "version 2; only version 1"),
        ("a CIDv0", "CIDv0; only CIDv1"),
        ("a damaged block", "is damaged"),
        ("a block cut off", "ends within a block"),
        ("a section of no bytes", "has no bytes"),
        ("an identity hash", "can't be verified"),
    ],
)
def test_the_sentence_says_what_is_wrong(what: str, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        read(REFUSED[what])


def test_the_largest_block_passes_and_a_length_costs_nothing() -> None:
    large = block(bytes(MAX_BLOCK_BYTES))
    assert read(HEAD + encode_block(large), 1 << 16) == [HEADER, large]
    reader = Reader()
    reader.feed(HEAD)
    assert reader.next() == HEADER
    reader.feed(put_varint(1 << 62))
    with pytest.raises(RemoteProtocolError, match="the limit is"):
        reader.next()


def test_as_many_roots_as_the_header_holds() -> None:
    for count in (23, 24, 255, 256, 1500):
        header = Header((MANIFEST.cid,) * count)
        assert read(encode_header(header)) == [header]


def test_writer_refuses_what_no_reader_takes() -> None:
    for roots in ((), (HELLO.cid[:35],), (b"\x12\x20" + bytes(32),), (MANIFEST.cid,) * 2000, (HELLO.cid + b"\0",)):
        with pytest.raises(LocalProtocolError):
            encode_header(Header(roots))
    for cid, size in ((HELLO.cid, MAX_BLOCK_BYTES + 1), (HELLO.cid[:35], 1), (HELLO.cid, -1)):
        with pytest.raises(LocalProtocolError):
            section_head(cid, size)
