"""How busy our stage is, as others are told."""

from __future__ import annotations

from typing import Final

from meshnode.core.signal import Changes

QUEUE_WEIGHT: Final = 0.1  # of the newest step in the moving average of the wait
QUEUE_STEP_US: Final = 3_000  # a move that is worth telling: every advert costs every node, amid its tokens


class StageLoad:
    """Counted by the stage, read by whoever advertises it."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.sessions = 0
        self.queue_us = 0
        self._average_us = 0.0

    def count(self, sessions: int) -> None:
        """So many sessions are open now."""
        if sessions != self.sessions:
            self.sessions = sessions
            self.changes.notify()

    def waited(self, us: int) -> None:
        """A step has waited so long for the engine."""
        self._average_us += QUEUE_WEIGHT * (us - self._average_us)
        if abs(self._average_us - self.queue_us) > max(QUEUE_STEP_US, self.queue_us // 2):
            self.queue_us = round(self._average_us)
            self.changes.notify()
