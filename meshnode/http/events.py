"""GET /events: the node's status whenever it changes, as server-sent events."""

from __future__ import annotations

from typing import Any, Final

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.http import sse
from meshnode.http.door import Door
from meshnode.http.problems import Problem

LEAST_S: Final = 0.25  # between two events
MOST_S: Final = 1.0  # after which figures that nobody announces are looked at
PING_S: Final = 10.0
MAX_LISTENERS: Final = 32
# These change all the time and are no news.
RESTLESS: Final = ("uptime_s", "rss_bytes", "age_s", "round_trip_ms", "layer_decode_us", "layer_prefill_us", "engine")


class Listeners:
    """How many listen."""

    def __init__(self) -> None:
        self.count = 0


class Events(Response):
    """An ASGI response that goes on until the client leaves."""

    def __init__(self, door: Door, listeners: Listeners) -> None:
        """Raises Problem 503 when too many listen."""
        if listeners.count >= MAX_LISTENERS:
            raise Problem(503, "overloaded", f"{MAX_LISTENERS} programs listen to events already", retry_s=10)
        super().__init__()
        self._door = door
        self._listeners = listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._listeners.count += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, send)
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()
        finally:
            self._listeners.count -= 1

    async def _tell(self, send: Send) -> None:
        headers = [(b"content-type", sse.MEDIA_TYPE.encode()), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        before: Any = None
        said = trio.current_time()
        while True:
            status = self._door.status().as_json()
            news = _lasting(status)
            if news != before:
                before, data = news, sse.event(status, "status")
            else:
                data = sse.PING if trio.current_time() - said >= PING_S else b""
            if data:
                said = trio.current_time()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await trio.sleep(LEAST_S)
            with trio.move_on_after(MOST_S - LEAST_S):
                await self._door.changed()


def _lasting(value: Any) -> Any:
    """The status without what is no news."""
    if isinstance(value, dict):
        return {name: _lasting(part) for name, part in value.items() if name not in RESTLESS}
    return [_lasting(part) for part in value] if isinstance(value, list) else value
