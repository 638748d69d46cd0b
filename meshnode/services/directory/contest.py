"""Another node has our key: our records are outbid by its own, and nobody should rely on either.

Each of the two outbids the other, with adverts that say that they are contested, as long as it hears newer ones that
it did not write. Once they cease, the one that is left takes the word back.
"""

from __future__ import annotations

import math
from typing import Final

import trio

from meshnode.core.signal import Changes
from protocols.advert.view import Version

QUIET_S: Final = 6.0  # without a newer record of the other one; it hears of ours within a third of that
ASK_S: Final = 2.0  # between exchanges with others meanwhile, which bring its newest record
WATCH_S: Final = 30.0  # for so long after it has said something; it may need a usual exchange to hear our answer


class Contest:
    """What we know of the other one."""

    def __init__(self) -> None:
        self.changes = Changes()  # whenever there is something to outbid
        self.highest: Version = (0, 0)  # that it has signed
        self._signed_at = -math.inf  # when others first had that
        self._told_at = -math.inf  # when we had it

    def begin(self, version: Version, signed_at: float) -> None:
        """A record came that we did not write. signed_at: when somebody had it first, by our clock."""
        self.highest = max(self.highest, version)
        self._signed_at = max(self._signed_at, signed_at)
        self._told_at = trio.current_time()
        self.changes.notify()

    @property
    def until(self) -> float:
        """When it is over, if nothing newer comes; in the past when there is none."""
        return self._signed_at + QUIET_S

    @property
    def is_watched(self) -> bool:
        """Whether others are asked for its newest record more often than usual."""
        return trio.current_time() < self._told_at + WATCH_S

    @property
    def goes_on(self) -> bool:
        return trio.current_time() < self.until
