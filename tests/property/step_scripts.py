"""Random ways to take a text through an engine: chunks, single decode steps, windows of drafts, and rewinds.

The rule that they hold: there are two classes of rows. Rows of a prompt and rows of a step with several rows
are of one class, single rows of decode steps of the other. Whatever the steps, the rewinds and the cuts, the same
classes of the same tokens give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from hypothesis import strategies as st

from meshnode.engine.backend import Array, Track


@dataclass(frozen=True, slots=True)
class Part:
    """One step. `detour`: first this many rows of other words here, which the step then overwrites."""

    rows: int
    prefill: bool
    detour: int

    @property
    def decode(self) -> bool:
        """Whether its row is of the class of decode steps."""
        return self.rows == 1 and not self.prefill


@dataclass(frozen=True, slots=True)
class Script:
    """Steps that go on one after the other, then back to `rewind` in steps of the same classes."""

    parts: tuple[Part, ...]
    rewind: int  # index of a part

    @property
    def length(self) -> int:
        return sum(part.rows for part in self.parts)

    def check(self, whole: Sequence[Track], chain: Sequence[Track], tokens: Array) -> None:
        """Take int32 `tokens` (length + 1,) through both; the fewest steps in `whole` are what `chain` is held to."""
        expected = self._shortest(whole, tokens)
        np.testing.assert_array_equal(self._walk(chain, tokens, 0), expected[0])
        np.testing.assert_array_equal(_decode(chain, tokens), expected[1])
        np.testing.assert_array_equal(self._walk(chain, tokens, self.rewind), expected[0])
        np.testing.assert_array_equal(_decode(chain, tokens), expected[1])

    def _walk(self, tracks: Sequence[Track], tokens: Array, begin: int) -> Array:
        position, out = 0, np.empty(0, np.float32)
        for index, part in enumerate(self.parts):
            if index >= begin:
                other = tokens[: min(part.detour, self.length - position)][::-1].copy()
                if len(other):
                    _step(tracks, position, other, prefill=part.prefill, wanted=False)
                out = _step(tracks, position, tokens[position : position + part.rows], prefill=part.prefill)
            position += part.rows
        return out

    def _shortest(self, tracks: Sequence[Track], tokens: Array) -> tuple[Array, Array]:
        position, out = 0, np.empty(0, np.float32)
        for decode, parts in groupby(self.parts, key=lambda part: part.decode):
            rows = sum(part.rows for part in parts)
            for step in [1] * rows if decode else [rows]:
                out = _step(tracks, position, tokens[position : position + step], prefill=not decode)
                position += step
        return out, _decode(tracks, tokens)


def _decode(tracks: Sequence[Track], tokens: Array) -> Array:
    return _step(tracks, len(tokens) - 1, tokens[-1:], prefill=False)


def _step(tracks: Sequence[Track], position: int, x: Array, *, prefill: bool, wanted: bool = True) -> Array:
    for track in tracks:
        x = track.run(position, x, prefill=prefill, wanted=wanted).copy()
    return x


def scripts(longest: int) -> st.SearchStrategy[Script]:
    """Texts of at most `longest` tokens; tiles of 128 and one or two more rows are drawn often."""
    rows = st.integers(1, longest // 2) | st.sampled_from([1, 1, 2, 3, min(129, longest // 2)])
    part = st.builds(Part, rows, st.booleans(), st.sampled_from([0, 0, 1, 2, 5]))
    lists = st.lists(part, min_size=1, max_size=7).filter(lambda parts: sum(p.rows for p in parts) <= longest)
    return lists.flatmap(lambda parts: st.builds(Script, st.just(tuple(parts)), st.integers(0, len(parts) - 1)))


def segmentations(layers: int) -> st.SearchStrategy[list[int]]:
    """Where the layers are cut, with both ends: [0, ..., layers]."""
    inner = st.lists(st.integers(1, layers - 1), max_size=3)
    return inner.map(lambda cuts: sorted({0, layers, *cuts}))
