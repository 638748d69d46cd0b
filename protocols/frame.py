"""Length-prefixed frames: a small header (one CBOR message) and a body of raw bytes (a tensor, a block).

Layout: header length (4 bytes, big endian), body length (4 bytes, big endian), header, body.
The body never passes through the CBOR comparison; most frames have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError

PREFIX_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 1 << 18  # 256 KiB: an anti-entropy reply with a few hundred records
MAX_BODY_BYTES: Final = 1 << 26  # 64 MiB: 4096 rows of 4096 float32 values


@dataclass(frozen=True, slots=True)
class Frame:
    header: bytes
    body: bytes = b""


def pack(header: bytes, body: bytes | memoryview = b"") -> bytes:
    """One frame as bytes. Raises LocalProtocolError above the limits."""
    size = body.nbytes if isinstance(body, memoryview) else len(body)  # a view of floats counts floats
    if len(header) > MAX_HEADER_BYTES or size > MAX_BODY_BYTES:
        raise LocalProtocolError(
            f"a frame of {len(header)} + {size} bytes; the limits are {MAX_HEADER_BYTES} + {MAX_BODY_BYTES}"
        )
    return b"".join((len(header).to_bytes(4, "big"), size.to_bytes(4, "big"), header, body))


class FrameReader:
    """Takes bytes as they come, gives whole frames. Holds at most one frame plus one read."""

    def __init__(self, *, max_header: int = MAX_HEADER_BYTES, max_body: int = MAX_BODY_BYTES) -> None:
        self._max_header = max_header
        self._max_body = max_body
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Add bytes now; iterate to take every frame that is complete (those not taken come with the next call).

        Raises, while iterating:
          RemoteProtocolError: a length above the limits (before anything of that size is buffered). The
            stream can't be read any further.
        """
        self._buffer += data
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        buffer = self._buffer
        while len(buffer) >= PREFIX_BYTES:
            header = int.from_bytes(buffer[:4], "big")
            body = int.from_bytes(buffer[4:8], "big")
            if header > self._max_header or body > self._max_body:
                raise RemoteProtocolError(
                    f"a frame of {header} + {body} bytes; the limits are {self._max_header} + {self._max_body}"
                )
            middle = PREFIX_BYTES + header
            end = middle + body
            if len(buffer) < end:
                return
            with memoryview(buffer) as view:
                frame = Frame(bytes(view[PREFIX_BYTES:middle]), bytes(view[middle:end]))
            del buffer[:end]  # cheap: a bytearray only moves its start
            yield frame

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame; not 0 at the end of a stream means it was cut off."""
        return len(self._buffer)
