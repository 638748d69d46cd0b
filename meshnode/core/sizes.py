"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{name: 1000**power for power, letter in enumerate("kmgt", 1) for name in (letter, f"{letter}b")},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_MOST: Final = 1 << 63
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of "40MB" (decimal units), "1.5GiB" (binary units), "4096" or 4096.

    Raises ValueError with a sentence for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"{text} is negative; a size is 0 or more, like 40MB or 1.5GiB")
        if text >= _MOST:
            raise ValueError("it is a size of more than any disk holds")
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 40MB, 1.5GiB or 4096")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size >= _MOST:  # infinity as well, which hundreds of digits are
        raise ValueError(f"{str(text)[:40]!r} is more than any disk holds")
    return round(size)


def format_size(size: int) -> str:
    """Bytes for people: 98.6 MB."""
    for unit, factor in (("TB", 1000**4), ("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if size >= 0.9995 * factor:  # what three digits round up to the next unit
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size // factor} {unit}"
    return f"{size} B"


def counted(number: int, what: str, several: str = "") -> str:
    """A number with its noun: 1 layer, 2 layers. `several`: the plural, where it takes more than an s."""
    return f"{number} {what if number == 1 else several or what + 's'}"
