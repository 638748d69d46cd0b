"""Three plain layouts of a vector with fewer bits. See SPEC.md; `codec.py` puts a header around them.

`write` takes finite float32 of at most 65504 in absolute value. `read` takes exactly `size(count)` bytes, and raises
RemoteProtocolError for values that the layout does not have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocols.delta.frame import Vector
from protocols.errors import RemoteProtocolError

BLOCK: Final = 64  # values that share a scale; larger blocks lose outliers (error 0.047 instead of 0.011 at 4096)
CHUNK: Final = 4096  # values of which the largest are taken
PART: Final = 50  # one value in so many is taken, rounded up
LOW_BITS: Final = 5  # of a place: the best split for one value in 50
_HIGH: Final = 1 << LOW_BITS

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


class Layout(ABC):
    """One way to write a vector of `count` values. All vectors of one length take the same number of bytes."""

    @abstractmethod
    def size(self, count: int) -> int:
        """Bytes that `count` values take."""

    @abstractmethod
    def write(self, values: Vector) -> bytes: ...

    @abstractmethod
    def read(self, data: bytes, count: int) -> Vector: ...


class Dense(Layout):
    """Blocks of 64: their scales (float16, little endian), then one code a value: value = scale * code / most."""

    def __init__(self, most: int, bits: int) -> None:
        self._most = most
        self._bits = bits

    def size(self, count: int) -> int:
        return 2 * _blocks(count) + (count * self._bits + 7) // 8

    def write(self, values: Vector) -> bytes:
        padded = np.zeros(_blocks(values.size) * BLOCK, np.float32)
        padded[: values.size] = values
        blocks = padded.reshape(-1, BLOCK)
        scales = _not_below(np.abs(blocks).max(axis=1))
        divisor = np.where(scales > 0, scales, 1).astype(np.float32)
        codes = np.rint(blocks / divisor[:, None] * self._most).astype(np.int8).reshape(-1)[: values.size]
        return scales.astype("<f2").tobytes() + self._packed(codes)

    def read(self, data: bytes, count: int) -> Vector:
        split = 2 * _blocks(count)
        scales = _scales(data[:split])
        codes = np.zeros(_blocks(count) * BLOCK, np.float32)
        codes[:count] = self._codes(data[split:], count)
        # Divided first: the factor is the same on every machine, and one rounding is left.
        steps = scales / np.float32(self._most)
        return np.ascontiguousarray((codes.reshape(-1, BLOCK) * steps[:, None]).reshape(-1)[:count])

    def _packed(self, codes: npt.NDArray[np.int8]) -> bytes:
        if self._bits == 8:
            return codes.tobytes()
        nibbles = np.zeros(codes.size + codes.size % 2, np.uint8)
        nibbles[: codes.size] = codes & 15
        return (nibbles[0::2] | nibbles[1::2] << 4).tobytes()

    def _codes(self, data: bytes, count: int) -> Array:
        raw: Bytes = np.frombuffer(data, np.uint8)
        codes: Array
        if self._bits == 4:
            nibbles = np.empty(2 * raw.size, np.uint8)
            nibbles[0::2], nibbles[1::2] = raw & 15, raw >> 4
            if nibbles[count:].any():
                raise RemoteProtocolError("A delta has bits behind its last value.")
            codes = (nibbles[:count] << 4).view(np.int8) >> 4  # the sign moves to where int8 has it
        else:
            codes = raw.view(np.int8)
        if codes.size and codes.min() < -self._most:
            raise RemoteProtocolError(f"A delta has a code below -{self._most}, which nobody writes.")
        return codes


class Sparse(Layout):
    """Of each chunk of 4096 the 2 % that are largest in absolute value; what is not taken is zero.

    Four parts, each for all chunks: two magnitudes a chunk (float16, little endian: smaller, larger); the low 5 bits
    of every place; the high bits as a bitmap in which a one is a place and a zero goes on to the next 32 places
    (Elias-Fano, ascending); a bit for the sign (one is negative) and a bit for the magnitude of every place. Bits
    fill bytes from the highest.
    """

    def size(self, count: int) -> int:
        taken, maps = _taken_total(count), _map_total(count)
        return 4 * len(_chunks(count)) + _bytes(LOW_BITS * taken) + _bytes(maps) + _bytes(2 * taken)

    def write(self, values: Vector) -> bytes:
        magnitudes, lows, maps, signs = [], [], [], []
        for start, end in _chunks(values.size):
            chunk = values[start:end]
            taken = _taken(chunk.size)
            size = np.abs(chunk)
            places = np.sort(np.argpartition(size, chunk.size - taken)[chunk.size - taken :])
            found = size[places]
            large = found > np.median(found)
            small_mean = found[~large].mean()  # the median itself is never large, so there is one
            magnitudes.append((small_mean, found[large].mean() if large.any() else small_mean))
            lows.append(places % _HIGH)
            bitmap = np.zeros(taken + _highs(chunk.size), np.uint8)
            bitmap[places // _HIGH + np.arange(taken)] = 1
            maps.append(bitmap)
            signs.append(np.stack((chunk[places] < 0, large), axis=1).reshape(-1))
        return b"".join(
            (
                np.array(magnitudes, "<f2").tobytes(),
                np.packbits(_bits_of(np.concatenate(lows))).tobytes(),
                np.packbits(np.concatenate(maps)).tobytes(),
                np.packbits(np.concatenate(signs)).tobytes(),
            )
        )

    def read(self, data: bytes, count: int) -> Vector:
        chunks, taken, maps = _chunks(count), _taken_total(count), _map_total(count)
        ends = np.cumsum((4 * len(chunks), _bytes(LOW_BITS * taken), _bytes(maps)))
        magnitudes = _scales(data[: ends[0]]).reshape(-1, 2)
        lows = _bits(data[ends[0] : ends[1]], LOW_BITS * taken).reshape(-1, LOW_BITS) @ (
            1 << np.arange(LOW_BITS)[::-1]
        )
        bitmap = _bits(data[ends[1] : ends[2]], maps)
        marks = _bits(data[ends[2] :], 2 * taken).reshape(-1, 2)
        values = np.zeros(count, np.float32)
        at = at_map = 0
        for (start, end), pair in zip(chunks, magnitudes, strict=True):
            here = slice(at, at + _taken(end - start))
            width = _taken(end - start) + _highs(end - start)
            ones = np.flatnonzero(bitmap[at_map : at_map + width])
            if ones.size != _taken(end - start):
                raise RemoteProtocolError(
                    f"A chunk of a delta has {ones.size} places instead of {_taken(end - start)}."
                )
            places = (ones - np.arange(ones.size)) * _HIGH + lows[here]
            if (np.diff(places) <= 0).any() or places[-1] >= end - start:
                raise RemoteProtocolError("The places in a chunk of a delta are not ascending, or lie outside of it.")
            values[start + places] = np.where(marks[here, 0], -1, 1) * pair[marks[here, 1]]
            at, at_map = here.stop, at_map + width
        return values


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _taken(length: int) -> int:
    """Values that are taken of a chunk."""
    return -(-length // PART)


def _highs(length: int) -> int:
    """Zeros in the bitmap of a chunk."""
    return -(-length // _HIGH)


def _taken_total(count: int) -> int:
    whole, rest = divmod(count, CHUNK)
    return whole * _taken(CHUNK) + _taken(rest)


def _map_total(count: int) -> int:
    whole, rest = divmod(count, CHUNK)
    return whole * (_taken(CHUNK) + _highs(CHUNK)) + _taken(rest) + _highs(rest)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _bits_of(lows: Array) -> Bytes:
    """The low bits of places, the highest first."""
    return (lows[:, None] >> np.arange(LOW_BITS)[::-1] & 1).astype(np.uint8).reshape(-1)


def _bits(data: bytes, count: int) -> Bytes:
    """The first `count` bits; those that fill the last byte must be zero."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise RemoteProtocolError("A delta has bits behind its last value.")
    return bits[:count]


def _scales(data: bytes) -> Vector:
    """Scales or magnitudes: finite and not negative."""
    scales = np.frombuffer(data, "<f2").astype(np.float32)
    if not np.isfinite(scales).all() or np.signbit(scales).any():
        raise RemoteProtocolError("A delta has a scale that is not finite, or negative.")
    return scales


def _not_below(values: Vector) -> Vector:
    """The float16 next to each value from above, as float32: a scale rounded down cuts off its largest value."""
    near = values.astype(np.float16)
    below = near.astype(np.float32) < values
    up = np.where(below, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)
    return np.minimum(up, np.float32(65504.0))
