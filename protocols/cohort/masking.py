"""Vectors in fixed point, hidden by pads that cancel out in the sum. SPEC.md, section Behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from nacl.secret import SecretBox
from numpy.typing import NDArray

from protocols.delta.frame import Vector
from protocols.errors import LocalProtocolError, RemoteProtocolError

SCALE: Final = 1 << 20
LARGEST: Final = 128.0  # absolute value; eight of them stay below 2^31 / SCALE
VALUE_BYTES: Final = 4

Words = NDArray[np.uint32]
_ONCE: Final = bytes(SecretBox.NONCE_SIZE)  # each seed makes one pad


@dataclass(frozen=True, slots=True)
class Pads:
    """Seeds of pads, 32 bytes each."""

    add: tuple[bytes, ...] = ()
    subtract: tuple[bytes, ...] = ()


def pad(seed: bytes, size: int) -> Words:
    """The key stream of XSalsa20: what zeros are encrypted to, without the tag before it."""
    stream = SecretBox(seed).encrypt(bytes(VALUE_BYTES * size), _ONCE).ciphertext[SecretBox.MACBYTES :]
    return np.frombuffer(stream, "<u4")


def _padded(values: Words, pads: Pads) -> Words:
    """Modulo 2^32, in place."""
    for seed in pads.add:
        values += pad(seed, values.size)
    for seed in pads.subtract:
        values -= pad(seed, values.size)
    return values


def masked(vector: Vector, pads: Pads) -> bytes:
    """The payload that others get.

    Raises LocalProtocolError: a value is not finite or above `LARGEST`; the training has diverged.
    """
    if not bool((np.abs(vector) <= LARGEST).all()):  # false for what is no number, too
        raise LocalProtocolError(
            f"An adapter with values above {LARGEST:g} can't be masked; the training has diverged."
        )
    fixed = np.rint(vector.astype(np.float64) * SCALE).astype(np.int64).astype(np.uint32)
    return _padded(fixed, pads).astype("<u4").tobytes()


class Sum:
    """Adds up what masked vectors hide, one after the other."""

    def __init__(self, parameters: int) -> None:
        self._total = np.zeros(parameters, np.uint32)
        self._count = 0

    def add(self, payload: bytes) -> None:
        """Raises RemoteProtocolError: it has another length."""
        if len(payload) != VALUE_BYTES * self._total.size:
            raise RemoteProtocolError(
                f"a masked vector has {len(payload)} bytes; {self._total.size} values take "
                f"{VALUE_BYTES * self._total.size}"
            )
        self._total += np.frombuffer(payload, "<u4")
        self._count += 1

    def mean(self, pads: Pads) -> Vector:
        """The mean of what was added, the same bits for everybody; at the end.

        Args:
          pads: all that did not cancel out.

        Raises RemoteProtocolError: it is no mean of values up to `LARGEST`; a member's pads are not what it said.
        """
        signed = _padded(self._total, pads).view(np.int32).astype(np.float64)
        mean = (signed / (SCALE * self._count)).astype(np.float32)
        if bool((np.abs(mean) > LARGEST).any()):
            raise RemoteProtocolError("the pads do not cancel out: a member did not mask with the keys that it gave")
        return mean
