"""Pauses between attempts: each twice as long as the one before, up to a cap, spread by a random draw."""

from __future__ import annotations

MAX_DOUBLINGS = 32  # beyond any cap


class Backoff:
    """The pauses of one thing that is tried again.

    Args:
      first: seconds after the first failure.
      cap: longest pause, before it is spread.
    """

    def __init__(self, first: float, cap: float) -> None:
        self._first = first
        self.cap = cap
        self.failures = 0

    def next(self, draw: float = 0.5) -> float:
        """Count a failure; seconds until the next attempt.

        draw: uniform in [0, 1). The pause is 0.5 to 1.5 times the nominal one, so that not everybody comes back at
        the same moment; the default is the nominal pause.
        """
        pause = min(self.cap, self._first * 2.0 ** min(self.failures, MAX_DOUBLINGS))
        self.failures += 1
        return pause * (0.5 + draw)

    def reset(self) -> None:
        """It worked: the next failure is a first one."""
        self.failures = 0
