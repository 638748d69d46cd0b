"""The bytes of a delta: a vector with fewer bits, and back. See SPEC.md for the layout.

Three forms: 8 or 4 bits a value in blocks of 64 with one scale each; or the 2 % of largest values of each chunk of
4096 with 2 bits each, their places as an Elias-Fano sequence. Whether zstd gains is tried for each delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import zstandard

from protocols.delta.frame import MAX_PARAMETERS, Vector
from protocols.delta.layouts import Dense, Layout, Sparse
from protocols.delta.messages import HEADER_BYTES, Codec
from protocols.errors import LocalProtocolError, RemoteProtocolError

MAGIC: Final = b"mdel"
VERSION: Final = 1
ZSTD_LEVEL: Final = 3
ZSTD_GAIN: Final = 0.97  # compressed only when it saves that much: reading it costs time on every peer
MAX_VALUE: Final = 65504.0  # the largest float16

MAX_WINDOW: Final = 1 << 23  # bytes that zstd may look back: ours looks back 2 MiB


_LAYOUTS: Final[dict[Codec, Layout]] = {
    Codec.INT8: Dense(127, 8),
    Codec.INT4: Dense(7, 4),
    Codec.SPARSE: Sparse(),
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A vector as it is sent."""

    payload: bytes
    sent: Vector  # what the receivers will read
    residual: Vector  # what they will not; belongs into the next one (error feedback)


def pack_delta(codec: Codec, delta: Vector, residual: Vector | None = None) -> Packed:
    """Write a vector, with what earlier ones left over.

    Raises:
      LocalProtocolError: no vector of float32, longer than any adapter, or with values that are not finite or above
        65504.
    """
    if delta.dtype != np.float32 or delta.ndim != 1 or not 1 <= delta.size <= MAX_PARAMETERS:
        raise LocalProtocolError(
            f"A delta is a vector of 1 to {MAX_PARAMETERS} float32, not {delta.dtype} {delta.shape}."
        )
    wanted = delta if residual is None else delta + residual
    if not np.isfinite(wanted).all() or np.abs(wanted).max() > MAX_VALUE:
        raise LocalProtocolError(
            f"A delta has values that are not finite, or above {MAX_VALUE:.0f}: the training has diverged. "
            "Go back to the last adapter and take a smaller learning rate."
        )
    body = _LAYOUTS[codec].write(wanted)
    small = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(body)
    pressed = len(small) < ZSTD_GAIN * len(body)
    header = (
        MAGIC + bytes((VERSION, codec, pressed, 0)) + delta.size.to_bytes(4, "big") + len(body).to_bytes(4, "big")
    )
    sent = _LAYOUTS[codec].read(body, delta.size)
    return Packed(header + (small if pressed else body), sent, np.float32(codec.kept) * (wanted - sent))


def largest_payload(codec: Codec, parameters: int) -> int:
    """Bytes of a delta of so many values that nothing could compress."""
    return HEADER_BYTES + _LAYOUTS[codec].size(parameters)


def unpack_delta(payload: bytes, *, codec: Codec, parameters: int) -> Vector:
    """The vector in a payload that should be of this codec and length. All values are finite.

    Nothing is allocated before the sizes agree.

    Raises:
      RemoteProtocolError: another codec, length or version; too many or too few bytes; a value that this format does
        not have.
    """
    if len(payload) < HEADER_BYTES or payload[:4] != MAGIC:
        raise RemoteProtocolError(f"A delta does not start with {MAGIC!r}: it is something else.")
    version, found, pressed, spare = payload[4:8]
    if version != VERSION or spare:
        raise RemoteProtocolError(f"A delta of the version {version}.{spare}; this node reads {VERSION}.0.")
    if found != codec:
        raise RemoteProtocolError(f"A delta is written with codec {found}, but its record names {int(codec)}.")
    count = int.from_bytes(payload[8:12], "big")
    if count != parameters:
        raise RemoteProtocolError(f"A delta has {count} values; adapters of its frame have {parameters}.")
    size = int.from_bytes(payload[12:16], "big")
    if size != _LAYOUTS[codec].size(parameters):
        raise RemoteProtocolError(
            f"A delta declares a body of {size} bytes; {parameters} values take {_LAYOUTS[codec].size(parameters)}."
        )
    body = _expanded(payload[HEADER_BYTES:], pressed, size)
    return _LAYOUTS[codec].read(body, parameters)


def _expanded(data: bytes, pressed: int, size: int) -> bytes:
    """The body in its plain form, exactly `size` bytes."""
    if pressed not in (0, 1):
        raise RemoteProtocolError(f"A delta is compressed with method {pressed}; only zstd (1) is known.")
    if not pressed:
        if len(data) != size:
            raise RemoteProtocolError(f"A delta has a body of {len(data)} bytes instead of {size}.")
        return data
    if len(data) >= size:
        raise RemoteProtocolError(f"A delta takes {len(data)} bytes compressed, and {size} plain.")
    try:
        declared = zstandard.get_frame_parameters(data).content_size
        if declared != size:
            raise RemoteProtocolError(f"A delta unfolds to {declared} bytes instead of {size}.")
        reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        return reader.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(f"A delta can't be decompressed: {error}.") from None
