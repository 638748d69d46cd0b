"""When an engine that was lost is started again."""

from __future__ import annotations

from math import inf
from typing import Final

from protocols.backoff import Backoff

ENGINE_PAUSE_S: Final = (0.5, 60.0)  # before a lost engine is started again: first, cap
HEALTHY_S: Final = 120.0  # an engine that ran this long was no failure


class EngineRestarts:
    """The pauses after losses. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.rests_until = -inf  # no engine is started before
        self._backoff = Backoff(*ENGINE_PAUSE_S)

    @property
    def failures(self) -> int:
        """Losses since an engine was healthy."""
        return self._backoff.failures

    def lost(self, now: float, draw: float) -> None:
        """An engine ended that nobody has ended. `draw`: uniform in [0, 1)."""
        self.rests_until = now + self._backoff.next(draw)

    def healthy(self) -> None:
        """An engine has run for `HEALTHY_S`: the next loss is a first one."""
        self._backoff.reset()
