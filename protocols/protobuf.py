"""Just enough protobuf for the formats that IPFS gives us (dag-pb, UnixFS, Bitswap): varints and fields.

Source: protobuf.dev, "Encoding". Groups (wire types 3 and 4) are refused; fixed-width fields are handed on raw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from protocols.errors import RemoteProtocolError

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5
MAX_VARINT_BYTES: Final = 10
MAX_FIELDS: Final = 1 << 15  # of one message: 4 MiB of empty fields would keep a device busy for seconds
_UINT64: Final = (1 << 64) - 1


def put_varint(number: int) -> bytes:
    """Unsigned LEB128 of 0 <= number < 2**64; a negative int32 or int64 is sent as its 64-bit complement."""
    number &= _UINT64
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def put_field(number: int, value: int | bytes) -> bytes:
    """One field: an int as varint, bytes with their length."""
    if isinstance(value, int):
        return put_varint(number << 3) + put_varint(value)
    return put_varint(number << 3 | BYTES) + put_varint(len(value)) + value


def take_varint(data: bytes | bytearray | memoryview, offset: int, end: int) -> tuple[int, int]:
    """The varint at `offset` and the offset after it.

    Raises:
      RemoteProtocolError: it does not end before `end`, is longer than 10 bytes or above 64 bits.
    """
    value = shift = 0
    for position in range(offset, min(end, offset + MAX_VARINT_BYTES)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _UINT64:
                raise RemoteProtocolError("a varint is above 64 bits")
            return value, position + 1
        shift += 7
    if end - offset >= MAX_VARINT_BYTES:
        raise RemoteProtocolError(f"a varint is longer than {MAX_VARINT_BYTES} bytes")
    raise RemoteProtocolError("a varint is cut off")


def fields(data: memoryview, most: int = MAX_FIELDS) -> Iterator[tuple[int, int | memoryview]]:
    """Every field of a message in wire order: (number, int for a varint, a view of the bytes for the rest).

    Raises:
      RemoteProtocolError: a length that leads outside, a cut varint, field number 0, a group, more than `most`
        fields (repeated and unknown ones included).
    """
    offset, end = 0, len(data)
    while offset < end:
        most -= 1
        if most < 0:
            raise RemoteProtocolError("a protobuf message has more fields than allowed")
        key, offset = take_varint(data, offset, end)
        number, kind = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise RemoteProtocolError(f"a protobuf field has the number {number}")
        if kind == VARINT:
            value, offset = take_varint(data, offset, end)
            yield number, value
            continue
        if kind == BYTES:
            length, offset = take_varint(data, offset, end)
        elif kind == FIXED64:
            length = 8
        elif kind == FIXED32:
            length = 4
        else:
            raise RemoteProtocolError(f"protobuf field {number} has the wire type {kind}, which is not in use")
        if length > end - offset:
            raise RemoteProtocolError(f"protobuf field {number} says {length} bytes, {end - offset} are left")
        yield number, data[offset : offset + length]
        offset += length


def as_int(number: int, value: int | memoryview) -> int:
    """The value of a varint field. Raises RemoteProtocolError for another wire type."""
    if isinstance(value, int):
        return value
    raise RemoteProtocolError(f"protobuf field {number} is not a varint")


def as_bytes(number: int, value: int | memoryview) -> memoryview:
    """The value of a bytes field. Raises RemoteProtocolError for another wire type."""
    if isinstance(value, int):
        raise RemoteProtocolError(f"protobuf field {number} is a varint, bytes were expected")
    return value
