"""Which lesson is followed, and the samples that all share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshnode.core.errors import ModelError
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, PeerId
from protocols.lesson.messages import Lesson, lesson_cid, read_lesson

MAX_SUITE: Final = 1 << 16  # samples
MAX_LINE_BYTES: Final = 1 << 16
MAX_LABELS: Final = 1024


@dataclass(frozen=True, slots=True)
class Given:
    """A lesson, and who gave it."""

    publisher: PeerId
    cid: Cid
    lesson: Lesson


def followed(
    notices: Mapping[PeerId, bytes], is_founder: Callable[[PeerId], bool]
) -> tuple[Given | None, dict[PeerId, str]]:
    """The lesson that goes before all others, as everybody sees it; and what is wrong with those that can't be read.

    Args:
      notices: contents by publisher; an empty one is taken back.
    """
    found: list[tuple[tuple[bool, int, PeerId], Given]] = []
    wrong: dict[PeerId, str] = {}
    for publisher, content in notices.items():
        if not content:
            continue
        try:
            lesson = read_lesson(content)
        except RemoteProtocolError as error:
            wrong[publisher] = str(error)
            continue
        rank = is_founder(publisher), lesson.created_ms, publisher
        found.append((rank, Given(publisher, lesson_cid(content), lesson)))
    return (max(found)[1] if found else None), wrong


@dataclass(frozen=True, slots=True)
class SuiteLine:
    """One held-out sample."""

    input: str
    label: str


def read_suite(data: bytes) -> tuple[SuiteLine, ...]:
    """The samples of a suite: JSON lines with `input` and `label`; empty lines are passed over.

    Raises ModelError, with the number of the line.
    """
    lines: list[SuiteLine] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        lines.append(_read_line(raw, number))
        if len(lines) > MAX_SUITE:
            raise ModelError(f"The suite has more than {MAX_SUITE} samples.")
    if not lines:
        raise ModelError("The suite has no samples.")
    if len({line.label for line in lines}) > MAX_LABELS:
        raise ModelError(f"The suite has more than {MAX_LABELS} different labels.")
    return tuple(lines)


def _read_line(raw: bytes, number: int) -> SuiteLine:
    if len(raw) > MAX_LINE_BYTES:
        raise ModelError(f"Line {number} of the suite has {len(raw)} bytes; {MAX_LINE_BYTES} are possible.")
    try:
        entry: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"Line {number} of the suite is no JSON.") from None
    texts: list[Any] = [entry.get(name) for name in ("input", "label")] if isinstance(entry, dict) else []
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if len(texts) != 2:
        raise ModelError(
            f'Line {number} of the suite is not like {{"input": "...", "label": "..."}} with a text in both.'
        )
    return SuiteLine(texts[0], texts[1])
