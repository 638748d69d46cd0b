"""Ending an answer before a stop string, however its text comes in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class StopStrings:
    """Holds back text that may become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._held = ""
        self.met = ""  # the stop string that ended the text

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was met (it and what follows are dropped)."""
        if not self._stops:
            return text, False
        self._held += text
        met = [(i, s) for s in self._stops if (i := self._held.find(s)) >= 0]
        if met:
            at, self.met = min(met)
            shown, self._held = self._held[:at], ""
            return shown, True
        keep = max(self._overlaps(), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def rest(self) -> str:
        """What is still held back when the answer ends."""
        held, self._held = self._held, ""
        return held

    def _overlaps(self) -> Iterator[int]:
        """Lengths of the ends of the held text with which a stop string begins."""
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
                if self._held.endswith(stop[:size]):
                    yield size
                    break
