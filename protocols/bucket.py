"""Token buckets: how often something may happen. Times are seconds of a monotonic clock, handed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

MAX_KEYS: Final = 2048  # buckets of one set; the one that was used longest ago is forgotten, and begins full again


class Bucket:
    """`burst` at once, then `per_s`."""

    __slots__ = ("_at", "_burst", "_level", "_per_s")

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._level, self._at = burst, now

    def take(self, now: float) -> bool:
        """Whether one more may happen now; then it counts."""
        if self.wait_s(now) > 0.0:
            return False
        self._level -= 1.0
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until one may be taken."""
        self._fill(now)
        return max(0.0, (1.0 - self._level) / self._per_s)

    def spend(self, cost: float, now: float, most_s: float) -> float:
        """Count what has happened already; seconds until it is paid for, `most_s` at most: the rest is forgiven.

        For readers, who learn what came only when they have it, and then wait before they read on.
        """
        self._fill(now)
        self._level = max(self._level - cost, -most_s * self._per_s)
        return max(0.0, -self._level / self._per_s)

    def _fill(self, now: float) -> None:
        self._level = min(self._burst, self._level + max(0.0, now - self._at) * self._per_s)
        self._at = now


class Buckets:
    """One for each key, made when the key is first seen."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()

    def take(self, key: Hashable, now: float) -> bool:
        """Whether one more of this key may happen now; then it counts."""
        return self.of(key, now).take(now)

    def is_empty(self, key: Hashable, now: float) -> bool:
        """Whether `take` would say no."""
        bucket = self._buckets.get(key)
        return bucket is not None and bucket.wait_s(now) > 0.0

    def of(self, key: Hashable, now: float) -> Bucket:
        """The bucket of a key, to be used soon: it may be forgotten, and made anew."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._per_s, self._burst, now)
            if len(self._buckets) > MAX_KEYS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket
