"""The two clocks: monotonic seconds for deadlines (`trio.current_time`), UTC milliseconds for signed records.

Nothing else in the runtime reads a clock, so a test owns time by giving a `VirtualWall` and trio's MockClock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

Monotonic = Callable[[], float]  # seconds since an arbitrary moment, never backwards
Wall = Callable[[], int]  # UTC milliseconds, may jump when a person sets the clock


def wall_ms() -> int:
    """UTC milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def monotonic() -> float:
    """Seconds for deadlines: trio's clock inside trio (virtual in tests), the system's elsewhere."""
    return trio.current_time() if trio.lowlevel.in_trio_run() else time.monotonic()


class VirtualWall:
    """A wall clock that moves with trio's clock, so that virtual time moves both. Call it like `wall_ms`.

    `skew_ms` may be changed at any time: a node whose clock is wrong.
    """

    def __init__(self, start_ms: int = 1_700_000_000_000, *, skew_ms: int = 0) -> None:
        self.start_ms = start_ms
        self.skew_ms = skew_ms
        self._began = trio.current_time()

    def __call__(self) -> int:
        return self.start_ms + self.skew_ms + round((trio.current_time() - self._began) * 1000)
