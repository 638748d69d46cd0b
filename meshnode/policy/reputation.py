"""What a peer's earlier deltas say about its next one.

A Beta distribution over "its delta can be used": counts that fade, so that a peer can make up for what it did, and so
that good deeds are not kept for a bad day (Jøsang, Ismail: "The Beta Reputation System", 2002).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

FADE: Final = 0.98  # a round; half of it is gone after 34
FLOOR: Final = 0.25  # below, nothing of the peer is fetched
BAN_S: Final = 86_400.0  # after a proof


@dataclass(frozen=True, slots=True)
class Reputation:
    """Good and bad deltas of one peer; everybody starts in the middle, and two bad ones are no verdict yet."""

    good: float = 2.0
    bad: float = 1.0
    banned_until: float = 0.0  # seconds, of the clock that `trusted` is asked with

    @property
    def score(self) -> float:
        """0 to 1."""
        return self.good / (self.good + self.bad)

    def banned(self, now: float) -> bool:
        """Whether it is left alone after a proof."""
        return now < self.banned_until

    def trusted(self, now: float) -> bool:
        """Whether a delta of this peer is worth fetching."""
        return not self.banned(now) and self.score >= FLOOR

    def after(self, used: bool) -> Reputation:
        """One more delta, used or refused for what it contained."""
        return replace(self, good=self.good + used, bad=self.bad + (not used))

    def faded(self) -> Reputation:
        """A round later: both counts go towards those of a newcomer."""
        start = Reputation()
        return replace(
            self,
            good=start.good + FADE * (self.good - start.good),
            bad=start.bad + FADE * (self.bad - start.bad),
        )

    def proved(self, now: float) -> Reputation:
        """It signed two deltas for one position, which no mistake explains."""
        return replace(self, banned_until=now + BAN_S)
