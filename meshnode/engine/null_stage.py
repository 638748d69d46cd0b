"""A stage made of integer arithmetic: no weights, no onnxruntime, the same numbers on every machine.

It stands in for a model where the model is not the point. Each layer mixes what it gets with the sum of
everything it got at earlier positions, with factors of its own, so a wrong route, a skipped or repeated layer,
a lost row or a KV position that was not rewound changes every token after it. All values are whole numbers
below 2**23, which float32 holds exactly. An adapter gives its layers other factors, which belong to its bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from meshnode.engine.backend import Array, Factors, Rows
from meshnode.model.adapter_file import Pair

_PRIME: Final = 8_388_593  # the largest prime below 2**23
_SPREAD: Final = 20.0  # logits lie in [0, 20)

Ints = np.ndarray[Any, np.dtype[np.int64]]


def _factor(*numbers: int) -> int:
    """A factor in [1, prime) that belongs to these numbers."""
    value = 0x9E3779B9
    for number in numbers:
        value = (value ^ number) * 0x85EBCA6B % (1 << 32)
        value ^= value >> 15
    return 1 + value % (_PRIME - 1)


@dataclass(frozen=True, slots=True)
class NullFactors:
    """Implements `Factors` (backend.py)."""

    salt: int  # of the bytes; never 0
    nbytes: int


@dataclass(slots=True)
class NullRows:
    """Implements `Rows` (backend.py)."""

    sums: Ints  # (layers, rows + 1, hidden)


class NullTrack:
    def __init__(
        self,
        stage: NullStage,
        first: int,
        last: int,
        capacity: int,
        factors: Mapping[int, Factors],
        normed: bool,
    ) -> None:
        layers, hidden, vocab = stage.layers, stage.hidden, stage.vocab
        self._span = range(first, last)
        self._layers = layers
        self._normed = normed
        self._hidden = hidden
        self._vocab = vocab
        self._salts = {layer: (given.salt,) for layer, given in factors.items() if isinstance(given, NullFactors)}
        # sums[i, p]: of what layer i got at the positions below p  (layers, capacity + 1, hidden)
        self._sums = np.zeros((last - first, capacity + 1, hidden), np.int64)

    def run(self, position: int, data: Array, *, prefill: bool, wanted: bool) -> Array:
        del prefill  # one kernel for all shapes
        end = position + len(data)
        columns = np.arange(1, self._hidden + 1)
        if self._span.start == 0:
            x = (data.astype(np.int64)[:, None] + 1) * columns * _factor(0) % _PRIME  # (rows, hidden)
        else:
            x = data.astype(np.int64) % _PRIME
        places = np.arange(position + 1, end + 1)[:, None]
        for sums, layer in zip(self._sums, self._span, strict=True):
            keys = x * (places * _factor(layer, 1) % _PRIME) % _PRIME
            sums[position + 1 : end + 1] = (sums[position] + np.cumsum(keys, axis=0)) % _PRIME
            x = (
                x * _factor(layer, 2, *self._salts.get(layer, ()))
                + sums[position + 1 : end + 1] * _factor(layer, 3)
                + layer
            ) % _PRIME
        if self._span.stop < self._layers or self._normed:
            return x.astype(np.float32)
        if not wanted:
            return np.empty(0, np.float32)
        return self._logits(x[-1])

    def keep(self, count: int) -> NullRows:
        return NullRows(self._sums[:, : count + 1].copy())

    def fill(self, rows: Rows, count: int, *, move: bool) -> None:
        assert isinstance(rows, NullRows)  # this stage made them
        self._sums[:, : count + 1] = rows.sums[:, : count + 1]
        if move:
            rows.sums = rows.sums[:, :1]

    def _logits(self, row: Ints) -> Array:
        value = int((row * np.arange(1, self._hidden + 1) % _PRIME).sum() % _PRIME)
        words: Ints = np.arange(1, self._vocab + 1)
        mixed = (words * (value + 1) % _PRIME + words * words) % _PRIME * _factor(self._layers) % _PRIME
        return (mixed * (_SPREAD / _PRIME)).astype(np.float32)


class NullStage:
    """Any span of any length; its files are never opened."""

    def __init__(self, *, layers: int, hidden: int, vocab: int) -> None:
        self.layers = layers
        self.hidden = hidden
        self.vocab = vocab

    @property
    def weight_bytes(self) -> int:
        return 0

    def open(
        self, first: int, last: int, capacity: int, factors: Mapping[int, Factors] = {}, *, normed: bool = False
    ) -> NullTrack:
        return NullTrack(self, first, last, capacity, factors, normed)

    def adapt(self, first: int, last: int, targets: Collection[str]) -> None:
        """Every layer takes any factors."""

    def factors(self, layer: int, pairs: Mapping[str, Pair], scale: float) -> NullFactors:
        salt = zlib.crc32(f"{layer} {scale}".encode())
        for target, pair in sorted(pairs.items()):
            for part in (target.encode(), pair.a.tobytes(), pair.b.tobytes()):
                salt = zlib.crc32(part, salt)
        return NullFactors(1 + salt, sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values()))
