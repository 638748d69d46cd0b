"""What `meshnode doctor` found out by one check, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from meshnode.core.printable import one_line


class Level(Enum):
    """OK: nothing to do. WARNING: it works, somebody should look. WRONG: it can't work like this."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. Everything but OK says what to do: in `remedy`, or at the end of a `text` of the health registry."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    code: str = ""  # of the health registry, where the node itself says it


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, one_line(text))


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, sentence(text), _remedy(remedy))


def wrong(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.WRONG, sentence(text), _remedy(remedy))


def sentence(text: str) -> str:
    """The words of an error as a sentence of its own, for another one follows."""
    text = one_line(text)
    head, space, rest = text.partition(" ")
    if head.isalpha() and head.islower():
        text = f"{head.capitalize()}{space}{rest}"
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def _remedy(text: str) -> str:
    """A sentence, or one that ends with a command, which is to be typed as it stands."""
    text = one_line(text)
    return text if ": " in text.rpartition(". ")[2] else sentence(text)


def exit_code(findings: Iterable[Finding]) -> int:
    """0 unless something is wrong; warnings don't count."""
    return 1 if any(finding.level is Level.WRONG for finding in findings) else 0
