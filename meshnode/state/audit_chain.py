"""Lines that name the hash of the line before: whoever changes, takes out or moves one breaks the chain.

A line is a JSON object in one line, `{"at":..., "n":..., "prev":"HEX", ..., "hash":"HEX"}`; its hash is SHA-256 of
all that stands before the hash. The chain alone does not show that its end was cut off, so the last hash is also kept
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

MAX_LINE: Final = 1 << 20  # bytes
FIRST: Final = "0" * 64  # what the first line names as the one before
MAX_PROBLEMS: Final = 20  # named; after that the rest is not worth reading
_LINE: Final = re.compile(rb'(\{.*),"hash":"([0-9a-f]{64})"\}', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Link:
    """The place of a line in the chain."""

    n: int = 0  # counts the lines from 1
    hash: str = FIRST


@dataclass(frozen=True, slots=True)
class Entry:
    """A line that is whole."""

    link: Link
    prev: str
    fields: dict[str, Any]  # at, via, who, what, ...


def write_line(before: Link, fields: dict[str, Any]) -> tuple[bytes, Link]:
    """The next line, with its line end, and its place."""
    body = json.dumps({**fields, "n": before.n + 1, "prev": before.hash}, separators=(",", ":"), sort_keys=True)[:-1]
    link = Link(before.n + 1, hashlib.sha256(body.encode()).hexdigest())
    return f'{body},"hash":"{link.hash}"}}\n'.encode(), link


def read_line(line: bytes) -> Entry:
    """A line without its end. Raises ValueError with a part of a sentence."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("is no line of an audit log")
    if hashlib.sha256(match[1]).hexdigest() != match[2].decode():
        raise ValueError("was changed: its hash is another")
    try:
        fields = json.loads(match[1] + b"}")
    except RecursionError:
        fields = {}
    n, prev = fields.pop("n", None), fields.pop("prev", None)
    if isinstance(n, bool) or not isinstance(n, int) or not isinstance(prev, str):
        raise ValueError("is no line of an audit log")
    return Entry(Link(n, match[2].decode()), prev, fields)


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at a log has found."""

    lines: int
    problems: tuple[str, ...]  # sentences without a full stop; none: all is as it was written


def verify(lines: Iterable[tuple[str, bytes]], base: Link, head: Link) -> Found:
    """Check all lines in order.

    Args:
      lines: each with its place, "audit.log line 3", and its line end.
      base: the last line that was taken out because the log had become long; lines up to it may still be there.
      head: the last line that was written, as it is known from elsewhere; a later one may be there.
    """
    problems: list[str] = []
    before: Link | None = None
    count, met_head = 0, head.n == 0 or head == base
    for place, line in lines:
        if len(problems) >= MAX_PROBLEMS:
            break
        if not line.endswith(b"\n") and before is not None and before.n >= head.n:
            break  # it is being written at this moment
        count += 1
        try:
            if not line.endswith(b"\n"):
                raise ValueError("is not complete")
            entry = read_line(line[:-1])
        except ValueError as error:
            problems.append(f"{place} {error}")
            before = None if before is None else Link(before.n + 1, "")
            continue
        problems += [f"{place} {what}" for what in _misplaced(entry, before, base)]
        if entry.link.n == head.n:
            met_head = True
            if entry.link != head:
                problems.append(f"{place} is not line {head.n} that was written")
        before = entry.link
    if not met_head and len(problems) < MAX_PROBLEMS:
        problems.append(f"the end is missing: the last line that was written is number {head.n}")
    return Found(count, tuple(problems))


def _misplaced(entry: Entry, before: Link | None, base: Link) -> list[str]:
    link = entry.link
    if before is None:
        if link.n > base.n + 1:
            return [f"is number {link.n}; those from {base.n + 1} on are missing or can't be read"]
        known = base if link.n == base.n + 1 else None
    else:
        if link.n != before.n + 1:
            return [f"is number {link.n}, and stands behind number {before.n}"]
        known = before if before.hash else None  # after a line that can't be read
    if known is not None and entry.prev != known.hash:
        return [f"does not follow number {known.n}: one of the two was made anew"]
    if link.n == base.n and link != base:
        return [f"is not line {base.n} that was written"]
    return []
