"""JSON as it goes out."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


class JsonResponse(Response):
    """JSON in UTF-8. Text of a model may hold half a surrogate pair, which JSON can spell and UTF-8 can't."""

    def __init__(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(to_bytes(document), status, headers, "application/json")


def to_bytes(document: Any) -> bytes:
    """Compact JSON."""
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
