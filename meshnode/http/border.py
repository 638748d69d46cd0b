"""Around all routes: an id for every request, pages of others, and bugs, which cost their request alone."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshnode.core.log import get_logger
from meshnode.http.dialect import refuse
from meshnode.http.gate import Gate
from meshnode.http.metrics import Metrics
from meshnode.http.problems import Problem

_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
ALLOWED: Final = "GET, POST, DELETE, OPTIONS"

_log = get_logger("http")


class Border:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, gate: Gate, metrics: Metrics) -> None:
        self._app = app
        self._gate = gate
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no route takes a web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        more = [(b"x-request-id", id.encode()), (b"request-id", id.encode()), (b"x-content-type-options", b"nosniff")]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *more]}
                self._metrics.responded(scope, message["status"])
            await send(message)

        try:
            if (origin := self._gate.check_origin(request)) is not None:
                more += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
                more += [(b"access-control-expose-headers", b"x-request-id, x-meshnode-receipt, x-meshnode-model")]
                if request.method == "OPTIONS":
                    await _preflight(request)(scope, receive, sending)
                    return
            await self._app(scope, receive, sending)
        except Problem as problem:
            await refuse(request.url.path, problem)(scope, receive, sending)
        except Exception:  # noqa: BLE001 - the border: Starlette has answered with 500
            _log.exception("request.failed", path=request.url.path[:80], request=id)


def _preflight(request: Request) -> Response:
    wanted: Any = request.headers.get("access-control-request-headers", "")
    headers = {"access-control-allow-methods": ALLOWED, "access-control-max-age": "600"}
    if re.fullmatch(r"[A-Za-z0-9, -]{1,1024}", wanted):
        headers["access-control-allow-headers"] = wanted
    return Response(status_code=204, headers=headers)
