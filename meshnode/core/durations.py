"""How long something lasts, as people write and read it."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_TEXT: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*([dhms])")
MAX_S: Final = 366 * 86_400


def parse_duration(text: str) -> float:
    """Seconds of "90s", "30m", "2h", "1.5d". Raises ValueError with a sentence."""
    match = _TEXT.fullmatch(text.strip().lower())
    if match is None or not 0 < (seconds := float(match[1]) * _UNITS[match[2]]) <= MAX_S:
        raise ValueError(f"{text[:40]!r} is no time like 30m, 2h or 1d (a year at most)")
    return seconds


def format_duration(seconds: float) -> str:
    """In the largest unit of which there are at least two: "45 s", "30 min", "3 h", "2 days"."""
    for name, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
