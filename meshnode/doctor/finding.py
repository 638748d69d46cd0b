"""What `meshnode doctor` found out by one check, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


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


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, one_line(text))


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.WARNING, one_line(text), one_line(remedy))


def wrong(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Level.WRONG, one_line(text), one_line(remedy))


def one_line(text: str) -> str:
    """Texts of peers may hold anything; a finding is one line of characters that can be shown."""
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else "?" for c in text).strip()


def exit_code(findings: Iterable[Finding]) -> int:
    """0 unless something is wrong; warnings don't count."""
    return 1 if any(finding.level is Level.WRONG for finding in findings) else 0
