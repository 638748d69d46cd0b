"""Server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from typing import Any, Final

from meshnode.http.json_text import to_bytes

MEDIA_TYPE: Final = "text/event-stream; charset=utf-8"
PING: Final = b": ping\n\n"  # a comment: clients skip it


def event(document: Any, name: str = "") -> bytes:
    """One event with JSON as its data, which has no line breaks."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_bytes(document) + b"\n\n"
