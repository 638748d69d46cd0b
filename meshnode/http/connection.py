"""One client's connection: HTTP/1.1 by Hypercorn's protocol, with limits on how long it may keep us.

Hypercorn's own connection writes without a time limit and takes any number of clients; one that reads nothing would
hold its answer, and the stages behind it, for ever. HTTP/2 is left out: no client here needs it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

READ_BYTES: Final = 1 << 16
IDLE_S: Final = 30.0  # for the header of a request, and between two requests
WRITE_S: Final = 20.0  # for a client to take a piece of an answer

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class _Http1(H11Protocol):
    """Without the ways into HTTP/2."""

    async def _check_protocol(self, event: h11.Request) -> None:
        return


class Connection:
    """Serves one stream until it ends."""

    def __init__(self, app: AppWrapper, config: Config, context: WorkerContext, stream: Stream) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._stream = stream
        self._sending = trio.Lock()
        self._idle = trio.CancelScope()
        self._protocol: _Http1

    async def run(self) -> None:
        """Until the client leaves or is idle for too long. Errors of the connection end it without a word."""
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            stream = self._stream
            secure = isinstance(stream, trio.SSLStream)
            raw = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
            async with TaskGroup() as group:
                self._protocol = _Http1(
                    self._app,
                    self._config,
                    self._context,
                    group,
                    ConnectionState({}),
                    secure,
                    _host(raw.socket.getpeername()),
                    _host(raw.socket.getsockname()),
                    self._send,
                )
                await self._read()
                await self._protocol.handle(Closed())
                if group._nursery is not None:
                    group._nursery.cancel_scope.cancel()  # what it asked for ends with it
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await trio.aclose_forcefully(self._stream)

    async def _read(self) -> None:
        with self._idle:
            self._idle.deadline = trio.current_time() + IDLE_S
            while True:
                try:
                    data = await self._stream.receive_some(READ_BYTES)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
                await self._protocol.handle(RawData(bytes(data)))
                if not data:
                    return

    async def _send(self, event: Event) -> None:
        match event:
            case RawData(data=data):
                async with self._sending:
                    with trio.move_on_after(WRITE_S) as late:
                        try:
                            await self._stream.send_all(data)
                        except (trio.BrokenResourceError, trio.ClosedResourceError):
                            self._idle.cancel()
                        except trio.Cancelled:  # what was cut in the middle must not be followed by anything
                            self._idle.cancel()
                            raise
                    if late.cancelled_caught:
                        self._idle.cancel()
            case Closed():
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                    if isinstance(self._stream, trio.SocketStream):
                        await self._stream.send_eof()
                self._idle.cancel()
            case Updated(idle=idle):
                self._idle.deadline = trio.current_time() + IDLE_S if idle else float("inf")


def _host(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
