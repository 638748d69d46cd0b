"""How busy our stage is, as others are told."""

from __future__ import annotations

from typing import Final

import trio

from meshnode.core.signal import Changes

QUEUE_WEIGHT: Final = 0.1  # of the newest step in the moving average of the wait
QUEUE_STEP_US: Final = 3_000  # a move that is worth telling: every advert costs every node, amid its tokens
SETTLE_S: Final = 0.3  # a session that is over by then (a probe) is not worth telling


class AdvertisedLoad:
    """Counted by the stage, read by whoever advertises it."""

    def __init__(self) -> None:
        self.changes = Changes()  # worth telling
        self.sessions = 0
        self.queue_us = 0
        self._average_us = 0.0
        self.counted = Changes()  # whenever `sessions` changes

    def count(self, sessions: int) -> None:
        """So many sessions are open now."""
        self.sessions = sessions
        self.counted.notify()

    def waited(self, us: int) -> None:
        """A step has waited so long for the engine."""
        self._average_us += QUEUE_WEIGHT * (us - self._average_us)
        if abs(self._average_us - self.queue_us) > max(QUEUE_STEP_US, self.queue_us // 2):
            self.queue_us = round(self._average_us)
            self.changes.notify()

    async def settle(self) -> None:
        """Tell of sessions that stay, until cancelled."""
        told, version = self.sessions, self.counted.version
        while True:
            version = await self.counted.wait(version)
            await trio.sleep(SETTLE_S)
            if self.sessions != told:
                told = self.sessions
                self.changes.notify()
