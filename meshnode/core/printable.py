"""Words from outside that reach a terminal or a log: nothing in them may steer either."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with every control, direction and unassigned character spelt out (`\\x1b`), but those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The same on one line, without blanks around it."""
    return printable(" ".join(text.split()))
