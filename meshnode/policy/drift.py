"""Whether the answers have become worse: how many of the last ones that somebody judged here were wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LAST: Final = 200  # judged answers that count
FEWEST: Final = 20  # judged answers below which nothing is said
ALARM: Final = 0.05  # share of wrong ones above which somebody is told


@dataclass(frozen=True, slots=True)
class Drift:
    """`wrong` of the last `judged` answers were wrong."""

    wrong: int
    judged: int

    @property
    def rate(self) -> float:
        """0 when nothing was judged."""
        return self.wrong / self.judged if self.judged else 0.0

    @property
    def alarming(self) -> bool:
        return self.judged >= FEWEST and self.rate > ALARM


def drift_of(right: Sequence[bool]) -> Drift:
    """`right`: whether each judged answer was right, newest first; more than LAST do not count."""
    counted = right[:LAST]
    return Drift(wrong=sum(not good for good in counted), judged=len(counted))
