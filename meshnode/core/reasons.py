"""Why a file can't be read, for people: without numbers of errors, and without the path a second time."""

from __future__ import annotations


def cause(error: OSError | ValueError) -> str:
    """A part of a sentence."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    return str(error)
