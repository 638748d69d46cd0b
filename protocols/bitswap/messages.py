"""The one message of Bitswap 1.2 (specs.ipfs.tech/bitswap-protocol), encoded by hand, and its stream framing.

On a stream each message is preceded by its length as a varint. Payload blocks are views of the received
bytes: nothing is copied between the wire and the hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_PB
from protocols.protobuf import as_bytes, as_int, fields, put_field, put_varint, take_varint

PROTOCOL: Final = "/ipfs/bitswap/1.2.0"
MAX_MESSAGE_BYTES: Final = 4 << 20  # what go-bitswap reads at most
MAX_BLOCK_BYTES: Final = 2 << 20  # specs.ipfs.tech: larger blocks are not transferred
MAX_ENTRIES: Final = 16384  # wantlist entries or presences in one message; go-bitswap keeps 1024 a peer
MAX_BLOCKS: Final = 1024
MAX_CID_BYTES: Final = 168  # the default of go-bitswap
MAX_PREFIX_BYTES: Final = 40  # four varints
MAX_FIELDS: Final = 32  # in one entry, block or presence, unknown ones included
MAX_EMPTY: Final = 1024  # messages of no bytes in a row
_INT32_HIGH: Final = (1 << 31) - 1

Buffer = bytes | bytearray | memoryview


_OLD_HEAD: Final = b"\x12\x20"  # a CIDv0 is a bare sha2-256 multihash, always of a dag-pb block


def modern(cid: bytes) -> bytes:
    """The CIDv1 of a binary CID of either version."""
    return bytes((1, DAG_PB)) + cid if len(cid) == 34 and cid[:2] == _OLD_HEAD else cid


def spellings(cid: bytes) -> tuple[bytes, ...]:
    """All binary CIDs by which somebody may ask for the block of a CIDv1."""
    return (cid, cid[2:]) if cid[:4] == bytes((1, DAG_PB, 0x12, 32)) else (cid,)


def prefix_of(cid: bytes) -> bytes:
    """What goes before a block that was asked by this binary CID with sha2-256, of either version."""
    return b"\x00\x70\x12\x20" if len(cid) == 34 and cid[:2] == _OLD_HEAD else cid[:4]


class WantType(IntEnum):
    BLOCK = 0
    HAVE = 1


class PresenceType(IntEnum):
    HAVE = 0
    DONT_HAVE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One wish, or the end of one."""

    cid: bytes  # binary, 1 to 168 bytes; whatever version and hash the asker uses
    priority: int = 1  # higher first, int32
    cancel: bool = False
    want_type: WantType = WantType.BLOCK
    send_dont_have: bool = False  # "tell me if you do not have it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    prefix: bytes  # the CID without its digest: version, codec, hash function, digest length as varints
    data: Buffer

    def cid(self) -> bytes | None:
        """The binary CIDv1 that these bytes have, or None for a hash other than sha2-256. Hashes the bytes."""
        head = bytes((1, DAG_PB, 0x12, 32)) if self.prefix == b"\x00\x70\x12\x20" else self.prefix
        if len(head) != 4 or head[0] != 1 or head[1] > 0x7F or head[2:] != b"\x12\x20":
            return None
        return head + hashlib.sha256(self.data).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    cid: bytes
    type: PresenceType


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Any mix of wishes, blocks and presences."""

    entries: tuple[Entry, ...] = ()
    full: bool = False  # the entries replace every earlier wish of the sender
    blocks: tuple[Block, ...] = ()
    presences: tuple[Presence, ...] = ()
    pending_bytes: int = 0  # bytes of blocks that wait at the sender for the receiver, about


def _entry(entry: Entry) -> bytes:
    if not 1 <= len(entry.cid) <= MAX_CID_BYTES:
        raise LocalProtocolError(f"a wantlist entry names a CID of {len(entry.cid)} bytes")
    if not -_INT32_HIGH - 1 <= entry.priority <= _INT32_HIGH:
        raise LocalProtocolError(f"a wantlist entry has the priority {entry.priority}, which is no int32")
    out = put_field(1, entry.cid) + put_field(2, entry.priority)
    if entry.cancel:
        out += b"\x18\x01"
    if entry.want_type:
        out += put_field(4, int(entry.want_type))
    if entry.send_dont_have:
        out += b"\x28\x01"
    return out


def encode_parts(message: Message) -> list[Buffer]:
    """The protobuf message in pieces; the data of blocks is not copied.

    Raises LocalProtocolError when a limit is broken.
    """
    if max(len(message.entries), len(message.presences)) > MAX_ENTRIES or len(message.blocks) > MAX_BLOCKS:
        raise LocalProtocolError(
            f"a message with {len(message.entries)} entries, {len(message.presences)} presences and "
            f"{len(message.blocks)} blocks is above the limits"
        )
    parts: list[Buffer] = []
    head = b""
    if message.entries or message.full:
        wantlist = b"".join(put_field(1, _entry(entry)) for entry in message.entries)
        head = put_field(1, wantlist + (b"\x10\x01" if message.full else b""))
    for block in message.blocks:
        if len(block.data) > MAX_BLOCK_BYTES or len(block.prefix) > MAX_PREFIX_BYTES:
            raise LocalProtocolError(f"a block of {len(block.data)} bytes; the limit is {MAX_BLOCK_BYTES}")
        inner = put_field(1, block.prefix) + b"\x12" + put_varint(len(block.data))
        head += b"\x1a" + put_varint(len(inner) + len(block.data)) + inner
        parts += (head, block.data)
        head = b""
    tail = [head]
    for presence in message.presences:
        tail.append(put_field(4, put_field(1, presence.cid) + put_field(2, int(presence.type))))
    if message.pending_bytes:
        tail.append(put_field(5, min(message.pending_bytes, _INT32_HIGH)))
    parts.append(b"".join(tail))
    if sum(len(part) for part in parts) > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"a Bitswap message is above {MAX_MESSAGE_BYTES} bytes")
    return parts


def encode(message: Message) -> bytes:
    """The protobuf message without its length. Raises LocalProtocolError when a limit is broken."""
    return b"".join(encode_parts(message))


def frame_parts(message: Message) -> list[Buffer]:
    """A message with its length before it, in pieces that go on the stream one after the other."""
    parts = encode_parts(message)
    length = put_varint(sum(len(part) for part in parts))
    first = parts[0]
    return [length + bytes(first), *(part for part in parts[1:] if len(part))]


def _bool(number: int, value: int | memoryview) -> bool:
    flag = as_int(number, value)
    if flag > 1:
        raise RemoteProtocolError(f"the flag in field {number} is {flag}")
    return bool(flag)


def _cid(number: int, value: int | memoryview) -> bytes:
    cid = bytes(as_bytes(number, value))
    if not 1 <= len(cid) <= MAX_CID_BYTES:
        raise RemoteProtocolError(f"a CID of {len(cid)} bytes; allowed are 1 to {MAX_CID_BYTES}")
    return cid


def _int32(number: int, value: int | memoryview) -> int:
    plain = as_int(number, value)
    signed = plain - (1 << 64) if plain >> 63 else plain
    if not -_INT32_HIGH - 1 <= signed <= _INT32_HIGH:
        raise RemoteProtocolError(f"field {number} is {signed}, which is no int32")
    return signed


def _decode_entry(view: memoryview) -> Entry:
    cid, priority, cancel, kind, dont_have = b"", 0, False, 0, False
    for number, value in fields(view, MAX_FIELDS):
        if number == 1:
            cid = _cid(number, value)
        elif number == 2:
            priority = _int32(number, value)
        elif number == 3:
            cancel = _bool(number, value)
        elif number == 4:
            kind = as_int(number, value)
        elif number == 5:
            dont_have = _bool(number, value)
    if not cid:
        raise RemoteProtocolError("a wantlist entry names no CID")
    if kind > 1:
        raise RemoteProtocolError(f"a wantlist entry has the want type {kind}")
    return Entry(cid=cid, priority=priority, cancel=cancel, want_type=WantType(kind), send_dont_have=dont_have)


def _decode_block(view: memoryview) -> Block:
    prefix, data = b"", view[:0]
    for number, value in fields(view, MAX_FIELDS):
        if number == 1:
            prefix = bytes(as_bytes(number, value)[: MAX_PREFIX_BYTES + 1])
        elif number == 2:
            data = as_bytes(number, value)
    if not 1 <= len(prefix) <= MAX_PREFIX_BYTES:
        raise RemoteProtocolError(f"a block comes with a CID prefix of {len(prefix)} bytes")
    if len(data) > MAX_BLOCK_BYTES:
        raise RemoteProtocolError(f"a block of {len(data)} bytes; the limit is {MAX_BLOCK_BYTES}")
    return Block(prefix=prefix, data=data)


def _decode_presence(view: memoryview) -> Presence:
    cid, kind = b"", 0
    for number, value in fields(view, MAX_FIELDS):
        if number == 1:
            cid = _cid(number, value)
        elif number == 2:
            kind = as_int(number, value)
    if not cid or kind > 1:
        raise RemoteProtocolError(f"a block presence of the type {kind} names a CID of {len(cid)} bytes")
    return Presence(cid=cid, type=PresenceType(kind))


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise RemoteProtocolError(f"a Bitswap message has more than {limit} entries, presences or blocks")


def decode(data: Buffer) -> Message:
    """Read one message. Unknown fields are skipped, as protobuf asks.

    Raises:
      RemoteProtocolError: no protobuf, a wrong wire type, a limit, an unknown enum value, or blocks in the
        form of Bitswap 1.0 (field 2), which a 1.2 stream does not carry.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a Bitswap message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    entries: list[Entry] = []
    blocks: list[Block] = []
    presences: list[Presence] = []
    full, pending = False, 0
    for number, value in fields(memoryview(data)):
        if number == 1:
            for inner, item in fields(as_bytes(number, value)):
                if inner == 1:
                    entries.append(_decode_entry(as_bytes(inner, item)))
                    _check_count(len(entries), MAX_ENTRIES)
                elif inner == 2:
                    full = _bool(inner, item)
        elif number == 2:
            raise RemoteProtocolError("a block without CID prefix (Bitswap 1.0) came over a 1.2 stream")
        elif number == 3:
            blocks.append(_decode_block(as_bytes(number, value)))
            _check_count(len(blocks), MAX_BLOCKS)
        elif number == 4:
            presences.append(_decode_presence(as_bytes(number, value)))
            _check_count(len(presences), MAX_ENTRIES)
        elif number == 5:
            pending = max(0, _int32(number, value))
    return Message(
        entries=tuple(entries), full=full, blocks=tuple(blocks), presences=tuple(presences), pending_bytes=pending
    )


class MessageReader:
    """Takes bytes as they come, gives whole messages (undecoded). Holds at most one message."""

    def __init__(self) -> None:
        self._length = bytearray()
        self._buffer: bytearray | None = None
        self._filled = 0
        self._empty = 0  # messages of no bytes in a row

    def feed(self, data: Buffer) -> Iterator[memoryview]:
        """Add bytes, yield every message that is complete; each owns its memory.

        Raises:
          RemoteProtocolError: a length above 4 MiB (before anything is buffered) or not a varint, or messages
            of no bytes without end.
        """
        view = memoryview(data)
        while len(view):
            if self._buffer is None:
                view = self._take_length(view)
                continue
            room = len(self._buffer) - self._filled
            piece = view[:room]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == len(self._buffer):
                whole, self._buffer = self._buffer, None
                yield memoryview(whole)

    def _take_length(self, view: memoryview) -> memoryview:
        for position, byte in enumerate(view):
            self._length.append(byte)
            if byte < 0x80:
                length, _ = take_varint(self._length, 0, len(self._length))
                if length > MAX_MESSAGE_BYTES:
                    raise RemoteProtocolError(f"a Bitswap message of {length} bytes; limit {MAX_MESSAGE_BYTES}")
                self._length.clear()
                self._empty = 0 if length else self._empty + 1
                if length:
                    self._buffer, self._filled = bytearray(length), 0
                elif self._empty > MAX_EMPTY:
                    raise RemoteProtocolError(f"more than {MAX_EMPTY} Bitswap messages of no bytes in a row")
                return view[position + 1 :]
            if len(self._length) >= 4:
                raise RemoteProtocolError("the length of a Bitswap message is above 4 MiB")
        return view[:0]

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended; True at the end of a stream means it was cut off."""
        return self._buffer is not None or bool(self._length)
