"""The node's HTTP door: takes connections, as many as it can bear, and hands requests to the app."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any, Final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from meshnode.core.log import get_logger
from meshnode.http.connection import Connection, Stream
from meshnode.http.listen import Binding

MAX_CONNECTIONS: Final = 512
MAX_HEADER_BYTES: Final = 1 << 15
HANDSHAKE_S: Final = 10.0

_log = get_logger("http")


class HttpService:
    """Serves an ASGI app on a bound socket."""

    name = "http"

    def __init__(self, binding: Binding, app: Any, tls: ssl.SSLContext | None = None) -> None:
        """`app`: an ASGI application. `tls`: None for plain HTTP."""
        self._binding = binding
        self._app = ASGIWrapper(app)
        self._tls = tls
        self._config = Config()
        self._config.h11_max_incomplete_size = MAX_HEADER_BYTES
        self._config.include_server_header = False
        self._config.errorlog = None
        self._config.accesslog = None
        self._open = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then the socket goes."""
        context = WorkerContext(None)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._binding.socket))

        async def serve(stream: trio.SocketStream) -> None:
            if self._open >= MAX_CONNECTIONS:  # said in the only words that fit; a queue would only grow
                await _refuse(stream)
                return
            self._open += 1
            try:
                secured = await self._secured(stream)
                if secured is not None:
                    await Connection(self._app, self._config, context, secured).run()
            except Exception:  # noqa: BLE001 - the border: a bug that one client finds costs its connection alone
                _log.exception("http.failed")
            finally:
                self._open -= 1

        _log.info("http.listening", url=self._binding.url)
        async with trio.open_nursery() as nursery:
            task_status.started()
            await trio.serve_listeners(serve, [listener], handler_nursery=nursery)

    async def _secured(self, stream: trio.SocketStream) -> Stream | None:
        if self._tls is None:
            return stream
        secured: trio.SSLStream[trio.SocketStream] = trio.SSLStream(
            stream, self._tls, server_side=True, https_compatible=True
        )
        with trio.move_on_after(HANDSHAKE_S):
            try:
                await secured.do_handshake()
                return secured
            except trio.BrokenResourceError:
                pass
        await trio.aclose_forcefully(stream)
        return None


async def _refuse(stream: trio.SocketStream) -> None:
    words = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    with trio.move_on_after(1):
        with suppress(trio.BrokenResourceError):
            await stream.send_all(words)
    await trio.aclose_forcefully(stream)
