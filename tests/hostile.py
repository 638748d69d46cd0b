"""What hostile bytes may cost, and how valid bytes are made hostile.

Cost is counted, not timed: calls of Python functions (a resumed generator counts as one) and bytes allocated.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hypothesis import strategies as st

HUGE_NUMBERS = (0x7F, 0x80, (1 << 14) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
LONG_VARINTS = (b"\x80" * 9, b"\xff" * 10, b"\x80" * 20 + b"\x01", b"\x80\x00", b"\xff" * 9 + b"\x7f")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call took."""

    result: Any  # None when it was refused
    refused: str  # the error in words, "" when there was none
    calls: int  # of Python functions
    peak: int  # bytes allocated at once, above what was there before


def cost(call: Callable[[], Any], error: type[Exception]) -> Cost:
    """Run a call that may raise `error` and nothing else."""
    calls, result, refused = 0, None, ""

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    tracemalloc.start()
    sys.setprofile(count)
    try:
        result = call()
    except error as caught:
        refused = str(caught)
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(refused) < 1000
    assert not refused or refused.isprintable()
    return Cost(result, refused, calls, peak)


def varint(number: int) -> bytes:
    """Unsigned LEB128 of any size."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes], most: int = 3) -> bytes:
    """Valid bytes after one to `most` injuries: cut, flipped, spliced, repeated, huge numbers put in."""
    data = draw(valid)
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(("cut", "flip", "drop", "repeat", "move", "number", "varint", "noise")))
        if kind == "cut":
            data = data[:start]
        elif kind == "flip" and start < len(data):
            data = data[:start] + bytes((data[start] ^ 1 << draw(st.integers(0, 7)),)) + data[start + 1 :]
        elif kind == "drop":
            data = data[:start] + data[end:]
        elif kind == "repeat":
            data = data[:start] + data[start:end] * draw(st.integers(2, 50)) + data[end:]
        elif kind == "move":
            piece, data = data[start:end], data[:start] + data[end:]
            at = draw(st.integers(0, len(data)))
            data = data[:at] + piece + data[at:]
        elif kind == "number":
            data = data[:start] + varint(draw(st.sampled_from(HUGE_NUMBERS))) + data[start + 1 :]
        elif kind == "varint":
            data = data[:start] + draw(st.sampled_from(LONG_VARINTS)) + data[start:]
        else:
            data = data[:start] + draw(st.binary(max_size=20)) + data[end:]
    return data
