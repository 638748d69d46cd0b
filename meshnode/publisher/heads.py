"""Heads of sizes that the attention kernel can't take, made wider with zeros.

The kernel wants heads of a multiple of 8 columns; to turn them, a multiple of 16, and turns as many of them. Zero
columns of queries and keys add nothing to their products, zero columns of values come out as zeros and meet zero
columns of the output matrix: the wider model says exactly what the narrow one says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshnode.publisher.expression import Array
from meshnode.publisher.original import Rotation


@dataclass(frozen=True, slots=True)
class Widening:
    """Where the columns of a head go."""

    width: int  # columns of a head in the checkpoint
    places: tuple[int, ...]  # for each column of the wide head, that of the checkpoint; -1: a zero

    def rows(self, weight: Any) -> Any:
        """q, k or v: [heads * width, ...] -> [heads * wide, ...]. Takes and gives a torch tensor."""
        parts = weight.reshape(-1, self.width, *weight.shape[1:])
        wide = parts.new_zeros((parts.shape[0], len(self.places), *parts.shape[2:]))
        wide[:, self._filled()] = parts[:, [p for p in self.places if p >= 0]]
        return wide.reshape(-1, *weight.shape[1:])

    def columns(self, weight: Any) -> Any:
        """The output matrix: [hidden, heads * width] -> [hidden, heads * wide]."""
        return self.rows(weight.T.contiguous()).T.contiguous()

    def _filled(self) -> list[int]:
        return [at for at, place in enumerate(self.places) if place >= 0]


def widening(width: int, rotation: Rotation | None) -> Widening | None:
    """How heads of `width` columns are laid out for the kernel; None: they are right as they are."""
    angles = 0 if rotation is None else len(rotation.frequencies)
    wide_angles = -(-angles // 8) * 8
    rest = width - 2 * angles
    wide_rest = rest + (-(2 * wide_angles + rest) % (16 if angles else 8))
    if wide_angles == angles and wide_rest == rest:
        return None
    zeros = [-1] * (wide_angles - angles)
    if rotation is not None and rotation.interleaved:
        turned = [*range(2 * angles), *zeros, *zeros]
    else:
        turned = [*range(angles), *zeros, *range(angles, 2 * angles), *zeros]
    return Widening(width, (*turned, *range(2 * angles, width), *([-1] * (wide_rest - rest))))


def wide_frequencies(frequencies: Array) -> Array:
    """Frequencies for the turned columns of a wide head: the zero columns are turned by nothing."""
    missing = -len(frequencies) % 8
    return np.concatenate([frequencies, np.zeros(missing, np.float32)]).astype(np.float32)
