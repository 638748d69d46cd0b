"""Time during which this process was really awake: what its event loop could not see, it holds against nobody.

On a machine that has too much to do a loop stands still for seconds. Whatever it was to hear meanwhile waits in its
sockets, and a clock that went on would call everybody silent before any of it is read.
"""

from __future__ import annotations

from typing import Final

import trio

TICK_S: Final = 1.0
LATE_S: Final = 0.25  # a tick that comes later than this was held up


class AwakeClock:
    """Seconds from an arbitrary moment; stands still while the loop does, if `run` runs."""

    def __init__(self) -> None:
        self._lost = 0.0  # seconds that were slept through
        self._ticked_at: float | None = None

    def now(self) -> float:
        """Never more than a late tick ahead of the last one."""
        now = trio.current_time()
        if self._ticked_at is not None:
            now = min(now, self._ticked_at + TICK_S + LATE_S)
        return now - self._lost

    def real(self, moment: float) -> float:
        """When `trio.current_time` will be at a moment of this clock, if nothing is lost until then."""
        return moment + self._lost

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            self._ticked_at = before = trio.current_time()
            await trio.sleep(TICK_S)
            self._lost += max(0.0, trio.current_time() - before - TICK_S - LATE_S)
