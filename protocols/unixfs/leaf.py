"""Leaves that are dag-pb nodes around the bytes of the file: what Kubo makes by default.

The node has no links; its data is a UnixFS message (specs.ipfs.tech/unixfs): Type 1 = 2 (file), Data 2 = the bytes
(left out when there are none), filesize 3 = their number. What stands around the bytes follows from that number.
"""

from __future__ import annotations

from protocols.errors import RemoteProtocolError
from protocols.protobuf import put_field, put_varint

Buffer = bytes | bytearray | memoryview


def _around(length: int) -> tuple[bytes, bytes]:
    """What stands before and after `length` bytes of the file."""
    before = put_field(1, 2)
    if length:
        before += b"\x12" + put_varint(length)
    after = put_field(3, length)
    return b"\x0a" + put_varint(len(before) + length + len(after)) + before, after


def wrapped_bytes(length: int) -> int:
    """Length of the block around so many bytes."""
    before, after = _around(length)
    return len(before) + length + len(after)


def wrap(data: Buffer) -> bytes:
    """The block around the bytes of a leaf."""
    before, after = _around(len(data))
    return b"".join((before, data, after))


def unwrap(block: Buffer, length: int) -> memoryview:
    """The bytes of the file in a block that must hold `length` of them; not copied.

    Raises RemoteProtocolError when it is not exactly the block around so many bytes.
    """
    before, after = _around(length)
    view = memoryview(block)
    end = len(view) - len(after)
    if len(view) != len(before) + length + len(after) or view[: len(before)] != before or view[end:] != after:
        raise RemoteProtocolError(f"a leaf is not the canonical dag-pb node around {length} bytes of a file")
    return view[len(before) : end]
