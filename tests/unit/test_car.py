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
from protocols.ids import DAG_CBOR, DAG_PB, base58_encode, cid_from_bytes
from protocols.protobuf import put_varint
from tests.trees import block
from tests.vectors import Case, hold


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
OLD = Block(NODE.cid, NODE.data, old=True)
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
    "a damaged block with a CIDv0": HEAD + section(NODE.cid[2:], b"x"),
    "a CIDv0 that is cut off": HEAD + section(NODE.cid[2:35], b""),
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
        Case("a CIDv0", HEAD + encode_block(OLD), [HEADER, OLD]),
        Case("no blocks", HEAD, [HEADER]),
        Case("two roots", encode_header(Header((MANIFEST.cid, HELLO.cid))), [Header((MANIFEST.cid, HELLO.cid))]),
        *(Case(name, data) for name, data in REFUSED.items()),
    ]
    hold("car", cases, read)


# carv1-basic.car, the fixture of the specification, as go-car wrote it.
BASIC = bytes.fromhex(
    "63a265726f6f747382d82a58250001711220f88bc853804cf294fe417e4fa83028689fcdb1b1592c5102e1474dbc200fab8bd82a"
    "5825000171122069ea0740f9807a28f4d932c62e7c1c83be055e55072c90266ab3e79df63a365b6776657273696f6e015b017112"
    "20f88bc853804cf294fe417e4fa83028689fcdb1b1592c5102e1474dbc200fab8ba2646c696e6bd82a582300122002acecc5de24"
    "38ea4126a3010ecb1f8a599c8eff22fff1a1dcffe999b27fd3de646e616d6564626c69708301122002acecc5de2438ea4126a301"
    "0ecb1f8a599c8eff22fff1a1dcffe999b27fd3de122e0a2401551220b6fbd675f98e2abd22d4ed29fdc83150fedc48597e92dd1a"
    "7a24381d44a274511204626561721804122f0a22122079a982de3c9907953d4d323cee1d0fb1ed8f45f8ef02870c0cb9e09246bd"
    "530a12067365636f6e641895012801551220b6fbd675f98e2abd22d4ed29fdc83150fedc48597e92dd1a7a24381d44a274516363"
    "63638001122079a982de3c9907953d4d323cee1d0fb1ed8f45f8ef02870c0cb9e09246bd530a122d0a240155122081cc5b170186"
    "74b401b42f35ba07bb79e211239c23bffe658da1577e3e6468771203646f671804122d0a221220e7dc486e97e6ebe5cdabab3e39"
    "2bdad128b6e09acc94bb4e2aa2af7b986d24d0120566697273741833280155122081cc5b17018674b401b42f35ba07bb79e21123"
    "9c23bffe658da1577e3e64687762626262511220e7dc486e97e6ebe5cdabab3e392bdad128b6e09acc94bb4e2aa2af7b986d24d0"
    "122d0a240155122061be55a8e2f6b4e172338bddf184d6dbee29c98853e0a0485ecee7f27b9af0b4120363617418042801551220"
    "61be55a8e2f6b4e172338bddf184d6dbee29c98853e0a0485ecee7f27b9af0b461616161360171122069ea0740f9807a28f4d932"
    "c62e7c1c83be055e55072c90266ab3e79df63a365ba2646c696e6bf6646e616d65656c696d626f"
)
BASIC_NAMES = [
    "bafyreihyrpefhacm6kkp4ql6j6udakdit7g3dmkzfriqfykhjw6cad5lrm",
    "QmNX6Tffavsya4xgBi2VJQnSuqy9GsxongxZZ9uZBqp16d",
    "bafkreifw7plhl6mofk6sfvhnfh64qmkq73oeqwl6sloru6rehaoujituke",
    "QmWXZxVQ9yZfhQxLD35eDR8LiMRsYtHxYqTFCBbJoiJVys",
    "bafkreiebzrnroamgos2adnbpgw5apo3z4iishhbdx77gldnbk57d4zdio4",
    "QmdwjhxpxzcMsR3qUuj7vUL8pbA7MgR3GAxWi2GLHjsKCT",
    "bafkreidbxzk2ryxwwtqxem4l3xyyjvw35yu4tcct4cqeqxwo47zhxgxqwq",
    "bafyreidj5idub6mapiupjwjsyyxhyhedxycv4vihfsicm2vt46o7morwlm",
]


def test_the_fixture_of_the_specification() -> None:
    header, *blocks = read(BASIC, 50)
    assert isinstance(header, Header)
    assert [cid_from_bytes(cid) for cid in header.roots] == [BASIC_NAMES[0], BASIC_NAMES[-1]]
    written, names = encode_header(header), []
    for item in blocks:
        assert isinstance(item, Block)
        names.append(base58_encode(item.cid[2:]) if item.old else cid_from_bytes(item.cid))
        written += encode_block(item)
    assert names == BASIC_NAMES
    assert written == BASIC


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
        ("a CID of version 2", "unknown version 2"),
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


def test_a_short_name_does_not_make_room_for_more() -> None:
    data = bytes(MAX_BLOCK_BYTES + 1)
    with pytest.raises(RemoteProtocolError, match="the limit is"):
        read(HEAD + section(b"\x12\x20" + hashlib.sha256(data).digest(), data))


def test_as_many_roots_as_the_header_holds() -> None:
    for count in (23, 24, 255, 256, 1500):
        header = Header((MANIFEST.cid,) * count)
        assert read(encode_header(header)) == [header]


def test_writer_refuses_what_no_reader_takes() -> None:
    for roots in ((), (HELLO.cid[:35],), (b"\x12\x20" + bytes(32),), (MANIFEST.cid,) * 2000, (HELLO.cid + b"\0",)):
        with pytest.raises(LocalProtocolError):
            encode_header(Header(roots))
    with pytest.raises(LocalProtocolError):
        encode_block(Block(HELLO.cid, HELLO.data, old=True))  # a raw block has no CIDv0
    for cid, size in ((HELLO.cid, MAX_BLOCK_BYTES + 1), (HELLO.cid[:35], 1), (HELLO.cid, -1)):
        with pytest.raises(LocalProtocolError):
            section_head(cid, size)
