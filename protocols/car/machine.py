"""Reads a CAR file from pieces of any length. Holds one section and the piece that was fed last, no more."""

from __future__ import annotations

from protocols.car.messages import (
    MAX_HEADER_BYTES,
    MAX_SECTION_BYTES,
    MAX_VARINT_BYTES,
    NO_CAR,
    Block,
    Header,
    decode_header,
    decode_section,
)
from protocols.errors import RemoteProtocolError


class Reader:
    """`feed` bytes, take what `next` gives until it is None; `finish` at the end of the file.

    After a RemoteProtocolError it is not used again.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0  # bytes of the file before the buffer
        self._header: Header | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes of the file."""
        self._buffer += data

    def next(self) -> Header | Block | None:
        """The header first, then the blocks in the order of the file, verified; None: more bytes are needed.

        Raises RemoteProtocolError, which says at which byte of the file the part begins that is wrong.
        """
        try:
            return self._next()
        except RemoteProtocolError as error:
            raise type(error)(f"{error} (at byte {self._position})") from None

    def finish(self) -> None:
        """The file ends here. Raises RemoteProtocolError when it ends within its header or a block."""
        if self._header is None or self._buffer:
            where = "its header" if self._header is None else "a block"
            raise RemoteProtocolError(f"it ends within {where} (at byte {self._position + len(self._buffer)})")

    def _next(self) -> Header | Block | None:
        found = self._length()
        if found is None:
            return None
        start, length = found
        end = start + length
        if len(self._buffer) < end:
            return None
        item: Header | Block
        with memoryview(self._buffer) as view, view[start:end] as part:
            if self._header is None:
                item = self._header = decode_header(bytes(part))
            else:
                item = decode_section(part)
        del self._buffer[:end]
        self._position += end
        return item

    def _length(self) -> tuple[int, int] | None:
        """Where the part at the start of the buffer begins, and its length; None while that is not known."""
        doubt = "" if self._header else NO_CAR
        length = 0
        for index, byte in enumerate(self._buffer[:MAX_VARINT_BYTES]):
            length |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                break
        else:
            if len(self._buffer) < MAX_VARINT_BYTES:
                return None
            raise RemoteProtocolError(f"{doubt}a length has more than {MAX_VARINT_BYTES} bytes")
        what, limit = ("block", MAX_SECTION_BYTES) if self._header else ("header", MAX_HEADER_BYTES)
        if byte == 0:
            raise RemoteProtocolError(
                doubt + (f"a {what} has no bytes" if index == 0 else "a length is not in its shortest spelling")
            )
        if length > limit:
            raise RemoteProtocolError(f"{doubt}a {what} of {length} bytes, the limit is {limit}")
        return index + 1, length
