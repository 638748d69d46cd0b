"""Bitswap messages on the wire: vectors, framing, what is refused. The oracle is Google's protobuf runtime."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from protocols.bitswap.messages import (
    MAX_BLOCK_BYTES,
    MAX_ENTRIES,
    MAX_MESSAGE_BYTES,
    Block,
    Entry,
    Message,
    Presence,
    PresenceType,
    WantType,
    decode,
    encode,
    encode_parts,
)
from protocols.errors import LocalProtocolError, RemoteProtocolError
from tests.protobuf_oracle import oracle
from tests.vectors import Case, hold

RAW_PREFIX = bytes((1, 0x55, 0x12, 32))
CID = RAW_PREFIX + bytes(range(32))


def read(data: bytes) -> Message:
    """Decode, with the data of blocks as bytes."""
    message = decode(data)
    blocks = tuple(dataclasses.replace(block, data=bytes(block.data)) for block in message.blocks)
    return dataclasses.replace(message, blocks=blocks)


ACCEPTED = {
    "empty": Message(),
    "want-block": Message(entries=(Entry(cid=CID, send_dont_have=True),), full=True),
    "want-have": Message(entries=(Entry(cid=CID, want_type=WantType.HAVE, priority=7),)),
    "cancel": Message(entries=(Entry(cid=CID, cancel=True),)),
    "negative priority": Message(entries=(Entry(cid=CID, priority=-5),)),
    "cid version 0": Message(entries=(Entry(cid=b"\x12\x20" + bytes(32)),)),
    "block": Message(blocks=(Block(prefix=RAW_PREFIX, data=b"hello"),)),
    "empty block": Message(blocks=(Block(prefix=RAW_PREFIX, data=b""),)),
    "presences": Message(
        presences=(Presence(cid=CID, type=PresenceType.HAVE), Presence(cid=CID, type=PresenceType.DONT_HAVE)),
        pending_bytes=1 << 20,
    ),
    "everything": Message(
        entries=(Entry(cid=CID), Entry(cid=CID, cancel=True)),
        blocks=(Block(prefix=RAW_PREFIX, data=b"a"), Block(prefix=RAW_PREFIX, data=b"b")),
        presences=(Presence(cid=CID, type=PresenceType.HAVE),),
        pending_bytes=3,
    ),
}
REFUSED = {
    "cut varint": b"\x80",
    "varint of 11 bytes": b"\x28" + b"\xff" * 10 + b"\x01",
    "length leads outside": b"\x1a\x05\x0a\x01",
    "field number 0": b"\x00\x01",
    "group": b"\x0b\x0c",
    "wantlist is a varint": b"\x08\x01",
    "entry without a CID": b"\x0a\x04\x0a\x02\x10\x01",
    "unknown want type": b"\x0a\x07\x0a\x05\x0a\x01\x01\x20\x02",
    "flag of 2": b"\x0a\x07\x0a\x05\x0a\x01\x01\x18\x02",
    "priority is no int32": b"\x0a\x0a\x0a\x08\x0a\x01\x01\x10\x80\x80\x80\x80\x10",
    "block of version 1.0": b"\x12\x01a",
    "block without prefix": b"\x1a\x03\x12\x01a",
    "block with a long prefix": b"\x1a\x2b\x0a\x29" + bytes(41),
    "presence without a CID": b"\x22\x02\x10\x01",
    "unknown presence": b"\x22\x05\x0a\x01\x01\x10\x02",
    "CID of 169 bytes": b"\x22\xac\x01\x0a\xa9\x01" + bytes(169),
}


def test_vectors() -> None:
    cases = [Case(name, encode(message), message) for name, message in ACCEPTED.items()]
    cases += [Case(name, data) for name, data in REFUSED.items()]
    hold("bitswap", cases, read)


PUBLISHED = {
    "Entry": {
        "block": (1, "bytes"),
        "priority": (2, "int32"),
        "cancel": (3, "bool"),
        "wantType": (4, "uint"),
        "sendDontHave": (5, "bool"),
    },
    "Wantlist": {"entries": (1, "*Entry"), "full": (2, "bool")},
    "Block": {"prefix": (1, "bytes"), "data": (2, "bytes")},
    "BlockPresence": {"cid": (1, "bytes"), "type": (2, "uint")},
    "Message": {
        "wantlist": (1, "Wantlist"),
        "payload": (3, "*Block"),
        "blockPresences": (4, "*BlockPresence"),
        "pendingBytes": (5, "int32"),
    },
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_protobuf_runtime_reads_the_same(name: str) -> None:
    ours = ACCEPTED[name]
    theirs = oracle("bitswap", PUBLISHED)()
    theirs.ParseFromString(encode(ours))
    assert [(e.block, e.priority, e.cancel, e.wantType, e.sendDontHave) for e in theirs.wantlist.entries] == [
        (e.cid, e.priority, e.cancel, e.want_type, e.send_dont_have) for e in ours.entries
    ]
    assert theirs.wantlist.full == ours.full
    assert [(b.prefix, b.data) for b in theirs.payload] == [(b.prefix, b.data) for b in ours.blocks]
    assert [(p.cid, p.type) for p in theirs.blockPresences] == [(p.cid, p.type) for p in ours.presences]
    assert theirs.pendingBytes == ours.pending_bytes
    assert read(theirs.SerializeToString()) == ours


def test_unknown_fields_are_skipped_and_split_wantlists_joined() -> None:
    extra = b"\x7a\x03abc" + b"\x78\x05" + b"\x7d\x00\x00\x00\x00" + b"\x79" + bytes(8)
    one = encode(Message(entries=(Entry(cid=b"a"),)))
    two = encode(Message(entries=(Entry(cid=b"b"),), full=True))
    assert read(one + extra + two) == Message(entries=(Entry(cid=b"a"), Entry(cid=b"b")), full=True)


def test_the_bytes_name_the_block() -> None:
    digest = hashlib.sha256(b"hello").digest()
    assert Block(prefix=RAW_PREFIX, data=b"hello").cid() == RAW_PREFIX + digest
    assert Block(prefix=b"\x00\x70\x12\x20", data=b"hello").cid() == b"\x01\x70\x12\x20" + digest
    for prefix in (b"\x01\x55\x16\x20", b"\x01\x55\x12\x10", b"\x02\x55\x12\x20", b"\x01\x80\x02\x12\x20", b"\x01"):
        assert Block(prefix=prefix, data=b"hello").cid() is None


def test_blocks_are_not_copied() -> None:
    data = bytes(MAX_BLOCK_BYTES)
    parts = encode_parts(Message(blocks=(Block(prefix=RAW_PREFIX, data=data),)))
    assert any(part is data for part in parts)
    raw = bytearray(encode(Message(blocks=(Block(prefix=RAW_PREFIX, data=b"xyz"),))))
    (block,) = decode(raw).blocks
    assert isinstance(block.data, memoryview) and block.data.obj is raw


def test_our_own_limits() -> None:
    entry = Entry(cid=CID)
    for message in (
        Message(entries=(entry,) * (MAX_ENTRIES + 1)),
        Message(entries=(Entry(cid=b""),)),
        Message(entries=(Entry(cid=CID, priority=1 << 31),)),
        Message(blocks=(Block(prefix=RAW_PREFIX, data=bytes(MAX_BLOCK_BYTES + 1)),)),
        Message(blocks=(Block(prefix=RAW_PREFIX, data=bytes(MAX_BLOCK_BYTES)),) * 2),
    ):
        with pytest.raises(LocalProtocolError):
            encode(message)


def test_limits_of_what_comes() -> None:
    many = encode(Message(entries=(Entry(cid=b"a"),) * MAX_ENTRIES))
    assert len(decode(many).entries) == MAX_ENTRIES
    with pytest.raises(RemoteProtocolError):
        decode(many + many)
    with pytest.raises(RemoteProtocolError):
        decode(bytes(MAX_MESSAGE_BYTES + 1))
    large = b"\x0a\x04" + RAW_PREFIX + b"\x12\x81\x80\x80\x01" + bytes(MAX_BLOCK_BYTES + 1)
    with pytest.raises(RemoteProtocolError, match="block"):
        decode(b"\x1a" + b"\x8c\x80\x80\x01" + large)
