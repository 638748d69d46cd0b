"""Randomness as rules see it: it comes in as an argument, and the same seed gives the same choice."""

from __future__ import annotations

from typing import Any, Protocol


class Randomness(Protocol):
    """What `random.Random` can do."""

    def random(self) -> float:
        """From [0, 1)."""

    def gauss(self, mu: float, sigma: float) -> float: ...

    def shuffle(self, x: list[Any]) -> None: ...
