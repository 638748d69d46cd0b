"""Messages of libraries, made short enough for a sentence."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without its full stop; the kind of error when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
