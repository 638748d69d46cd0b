"""How the deltas of others change our adapter: policy/mixing.py and policy/robust.py on the vectors of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.policy.mixing import Outer, Theirs, added, averaged, elastic, outer_step, staleness_weight
from meshnode.policy.robust import cap_of, clipped_sum, distance, hostile_weight
from meshnode.services.learning.book import KEPT_DISTANCES, Page
from protocols.delta.codec import Packed, pack_delta
from protocols.delta.frame import Vector
from protocols.delta.messages import Codec
from protocols.round.events import Input
from protocols.round.schedule import Mode


@dataclass(frozen=True, slots=True)
class Arrived:
    """A delta of another that passed its checks: the difference from the base, or the change of a round."""

    given: Input
    vector: Vector


@dataclass(frozen=True, slots=True)
class Far:
    """An adapter that is further away than is plausible."""

    given: Input
    far: float
    most: float


_SHARED: Final = (Mode.BROADCAST, Mode.MASKED)  # what all have in common is kept beside our own


class Mixer:
    """Packs our adapter and mixes others' into it; a page is changed, not written."""

    def __init__(self, page: Page, base: Vector, mode: Mode, codec: Codec) -> None:
        """`base`: the adapter that differences count from."""
        self._page = page
        self._base = base
        self._mode = mode
        self._codec = codec
        self._sent: Vector | None = None  # what others have read last
        if mode in _SHARED and page.reference is None:
            page.reference = page.vector.copy()
        if mode is Mode.NOLOCO and page.slow is None:
            outer = Outer.start(page.vector.copy())
            page.slow, page.momentum = outer.slow, outer.momentum

    @property
    def difference(self) -> Vector:
        """Of our adapter from the base."""
        return self._page.vector - self._base

    def meet(self, mean: Vector, *, included: bool) -> None:
        """Take the mean of our cohort, a difference from the base. What it lacks of ours stays ours."""
        page = self._page
        assert page.reference is not None
        common = self._base + mean
        page.vector = common.copy() if included else common + (page.vector - page.reference)
        page.reference = common

    def end(self) -> None:
        """The rounds are over: nothing counts that only we have where nobody is to see it."""
        page = self._page
        if self._mode is Mode.MASKED:
            assert page.reference is not None
            page.vector = page.reference.copy()

    def pack(self, participants: int) -> tuple[Packed, Packed | None]:
        """Our adapter as it is sent; in the mode broadcast the change of this round, and the whole before it. That
        change is in our adapter as it was sent, from then on. In the mode masked what all of a cohort have.

        Args:
          participants: whom the change is divided by.

        Raises LocalProtocolError: the training has diverged.
        """
        page = self._page
        if self._mode is not Mode.BROADCAST:
            ours = page.reference if self._mode is Mode.MASKED else page.vector
            assert ours is not None
            packed = pack_delta(self._codec, ours - self._base)
            self._sent = self._base + packed.sent
            return packed, None
        assert page.reference is not None
        change = (page.vector - page.reference) / participants
        packed = pack_delta(self._codec, change.astype(page.vector.dtype), page.residual)
        whole = pack_delta(Codec.INT8, page.reference - self._base)
        page.residual = packed.residual
        page.reference = added(page.reference, [packed.sent])
        page.vector = page.reference.copy()
        return packed, whole

    def adopt(self, arrived: Sequence[Arrived]) -> None:
        """Begin with the mean of these instead of our own."""
        weights = [float(one.given.weight) for one in arrived]
        total = sum(weights)
        theirs = [Theirs(self._base + one.vector, w / total) for one, w in zip(arrived, weights, strict=True)]
        start = averaged(self._base, self._base, theirs)
        self._page.vector = start
        if self._mode in _SHARED:
            self._page.reference, self._page.residual = start.copy(), None
        if self._mode is Mode.NOLOCO:
            outer = Outer.start(start.copy())
            self._page.slow, self._page.momentum = outer.slow, outer.momentum

    def mix(self, arrived: Sequence[Arrived]) -> tuple[list[Arrived], list[Far]]:
        """Mix what is plausible into our adapter; what was, and what was not."""
        page = self._page
        if self._mode is Mode.BROADCAST:
            return self._add(arrived)
        assert self._sent is not None, "mixes come after a delta of our own"
        near, far, distances = self._sorted(arrived)
        theirs = [
            Theirs(self._base + one.vector, float(one.given.weight) * staleness_weight(one.given.staleness))
            for one in near
        ]
        page.distances = [*page.distances, *distances][-KEPT_DISTANCES:]
        match self._mode:
            case Mode.ELASTIC:
                page.vector = elastic(page.vector, self._sent, theirs)
            case Mode.NOLOCO:
                assert page.slow is not None and page.momentum is not None
                mean = clipped_sum(page.vector, self._sent, theirs, hostile_weight(theirs))
                outer = outer_step(Outer(page.slow, page.momentum), mean)
                page.vector, page.slow, page.momentum = outer.slow.copy(), outer.slow, outer.momentum
            case Mode.MASKED:
                assert page.reference is not None
                mixed = clipped_sum(page.reference, self._sent, theirs, hostile_weight(theirs))
                page.vector, page.reference = mixed + (page.vector - page.reference), mixed
            case _:
                page.vector = clipped_sum(page.vector, self._sent, theirs, hostile_weight(theirs))
        return near, far

    def _sorted(self, arrived: Sequence[Arrived]) -> tuple[list[Arrived], list[Far], list[float]]:
        assert self._sent is not None
        distances = [distance(self._base + one.vector, self._sent) for one in arrived]
        most = cap_of(self._page.distances, distances)
        pairs = list(zip(arrived, distances, strict=True))
        near = [one for one, far in pairs if far <= most]
        return (
            near,
            [Far(one.given, far, most) for one, far in pairs if far > most],
            [d for d in distances if d <= most],
        )

    def _add(self, arrived: Sequence[Arrived]) -> tuple[list[Arrived], list[Far]]:
        """Changes of rounds, whose size is bounded by what was usual."""
        page = self._page
        assert page.reference is not None
        zero = page.reference - page.reference
        sizes = [distance(one.vector, zero) for one in arrived]
        most = cap_of(page.distances, sizes)
        pairs = list(zip(arrived, sizes, strict=True))
        near = [one for one, size in pairs if size <= most]
        page.distances = [*page.distances, *(size for size in sizes if 0 < size <= most)][-KEPT_DISTANCES:]
        page.reference = added(page.reference, [one.vector for one in near])
        page.vector = page.reference.copy()
        return near, [Far(one.given, size, most) for one, size in pairs if size > most]
