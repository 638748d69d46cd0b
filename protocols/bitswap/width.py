"""How many peers are asked for blocks at once.

Where the links are slow, each further peer adds its own bandwidth. Where one peer already sends as fast as this
device can decrypt, hash and write, a further one adds nothing but work for both sides. Which of the two it is
can't be told from one peer's answers, so it is tried: twice as many peers, for a moment. Not while the rate rises by
itself, as in the first moments of every transfer: that would speak for any number of peers.
"""

from __future__ import annotations

import math
from typing import Final

MODEST_RATE: Final = 32 << 20  # bytes per second that every device takes in: below, more peers are asked untried
SAMPLE_S: Final = 0.05  # shortest time over which a rate is judged
SAMPLE_BYTES: Final = 8 << 20  # and the least that must have come in it
PAUSE_S: Final = 0.5  # a peer that was fast may be slow for so long: it is mostly this device that paused
RISING: Final = 1.1  # times the rate of the sample before: such a rate is still going up
WORTH: Final = 1.25  # twice as many peers stay when they bring so many times as much
FIRST_REST_S: Final = 2.0  # after a trial that failed; doubled with each
LAST_REST_S: Final = 64.0


class Spread:
    """Counts what comes in and sets `width`, the number of peers to ask."""

    def __init__(self) -> None:
        self.width = 1
        self._since = 0.0  # beginning of the present sample
        self._bytes = 0  # what came in it
        self._settling = False  # the sample is not used: it holds what was asked under another width
        self._fast = False  # a sample of this width was fast
        self._last = 0.0  # bytes per second of the sample before; it is no beginning any more: infinite
        self._before = 0.0  # bytes per second with half as many peers, while more are tried
        self._rest = FIRST_REST_S
        self._rests_until = 0.0

    @property
    def deadline(self) -> float:
        """When `decide` may know more although nothing comes."""
        return self._since + (PAUSE_S if self._fast else SAMPLE_S)

    def changed(self) -> None:
        """A peer came or went: what was found out is worth less now."""
        self._rest = FIRST_REST_S
        self._rests_until = 0.0

    def arrived(self, size: int) -> None:
        """A block of `size` bytes came."""
        self._bytes += size

    def decide(self, now: float, peers: int, owed: int) -> None:
        """Set `width` when enough was seen.

        Args:
          peers: that could be asked.
          owed: bytes that all peers together owe; 0: nothing was under way, it begins anew with one peer.
        """
        seconds = now - self._since
        if not owed:
            self._last, self._fast = 0.0, False
            self._begin(now, 1)
        elif seconds < SAMPLE_S or (self.width >= peers and not self._before):
            return
        elif self._bytes < MODEST_RATE * seconds:
            if now >= self.deadline:
                self._before, self._last = 0.0, math.inf
                self._begin(now, 2 * self.width)
        elif self._bytes >= SAMPLE_BYTES:
            self._judge(now, self._bytes / seconds)

    def _begin(self, now: float, width: int) -> None:
        self._settling, self._fast = width != self.width, self._fast and width == self.width
        self.width, self._since, self._bytes = width, now, 0

    def _judge(self, now: float, rate: float) -> None:
        """A sample of a fast width is complete: end a trial, begin one, or go on."""
        width, self._fast = self.width, True
        if self._settling:
            self._settling = False
        elif self._before and rate < WORTH * self._before:
            self._before = 0.0
            self._rests_until = now + self._rest
            self._rest = min(2 * self._rest, LAST_REST_S)
            width //= 2
        elif now >= self._rests_until:
            if rate <= RISING * self._last:
                self._before = rate
                width *= 2
            else:
                self._fast = self._last > 0.0  # one sample alone may be what was under way at the beginning
            self._last = rate
        self._begin(now, width)
