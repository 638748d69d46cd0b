"""The JSON of a request, with limits on its size, its time and its shape."""

from __future__ import annotations

import json
from typing import Any, Final

import trio
from starlette.requests import ClientDisconnect, Request

from meshnode.http.problems import Problem, wrong

MAX_BODY_BYTES: Final = 8 << 20  # a conversation; questions themselves are limited further inside
BODY_S: Final = 30.0  # for all of it

Json = dict[str, Any]
Kinds = type[Any] | tuple[type[Any], ...]


async def read_json(request: Request, *, empty: bool = False) -> Json:
    """The object that the body holds. `empty`: no body counts as an empty object.

    Raises Problem 400, 408, 413; ClientDisconnect.
    """
    data = await _read(request)
    if empty and not data.strip():
        return {}
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise Problem(400, "invalid_value", "the body is nested too deeply") from error
    except ValueError as error:
        raise Problem(400, "invalid_value", f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Problem(400, "invalid_value", "the body is JSON, but no object")
    return found


async def _read(request: Request) -> bytes:
    too_large = Problem(413, "too_large", f"the body has more than {MAX_BODY_BYTES} bytes")
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told[:18]) > MAX_BODY_BYTES:
        raise too_large
    data = bytearray()
    with trio.move_on_after(BODY_S) as late:
        async for piece in request.stream():
            data += piece
            if len(data) > MAX_BODY_BYTES:
                raise too_large
    if late.cancelled_caught:
        raise Problem(408, "timeout", f"the body did not come within {BODY_S:.0f} s")
    return bytes(data)


def field(body: Json, name: str, kind: Kinds, default: Any = None, *, at: str = "") -> Any:
    """A field of one of these types; `default` when it is missing or null. Raises Problem 400."""
    value = body.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join(_WORDS[one] for one in kinds)
        raise wrong(at + name, f"{at}{name} is {shown(value)}; it takes {words}")
    return value


def shown(value: Any) -> str:
    """A wrong value, shortly."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 40 else text[:37] + "..."


_WORDS: Final[dict[type[Any], str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}

__all__ = ["MAX_BODY_BYTES", "ClientDisconnect", "Json", "field", "read_json", "shown"]
