"""The node's control socket: what the command line asks a running node.

One JSON object per line, both ways, over a unix socket of mode 0600. A request is {"do": NAME, ...}; answers
are any number of objects, the last one holds "done" or "error": {"code", "text"}.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final

import trio

from meshnode.api.messages import INTERNAL, Json, error_json
from meshnode.core.errors import BadRequest, ConfigError, Declined, FatalError, NodeError, TransientError
from meshnode.core.log import get_logger
from protocols.errors import MeshError

MAX_REQUEST_BYTES: Final = 8 << 20  # a conversation; questions themselves are limited further inside
MAX_CLIENTS: Final = 64
BACKLOG: Final = 128  # clients that wait to be served; a further one would take us for stopped
READ_BYTES: Final = 1 << 16
REQUEST_S: Final = 10.0  # for the whole line: a program sends it in one go
LINGER_S: Final = 1.0  # for the client to read its answer and hang up

_log = get_logger("control")

Command = Callable[[Json], AsyncGenerator[Json, None]]


def read_request(line: bytes | bytearray, names: Collection[str]) -> Json:
    """One line of the socket as a request for one of these commands. Raises Declined `bad-request`."""
    try:
        request = json.loads(line)
    except ValueError as error:
        raise BadRequest(f"a request is one line of JSON: {error}") from error
    except RecursionError as error:
        raise BadRequest("a request is one line of JSON, but it is nested too deeply") from error
    name = request.get("do") if isinstance(request, dict) else None
    if not isinstance(name, str) or name not in names:
        known = ", ".join(sorted(names))
        raise BadRequest(f'a request is {{"do": NAME, ...}}; names are {known}')
    return dict(request)


class ControlService:
    """Answers the command line."""

    name = "control"

    def __init__(
        self, path: Path, commands: Mapping[str, Command], name_peers: Callable[[str], str] = lambda text: text
    ) -> None:
        """
        Args:
          commands: what can be asked; each yields its answers, errors are MeshError.
          name_peers: puts names beside the peer ids in the sentence of an error.
        """
        self._name_peers = name_peers
        self._path = path
        self._commands = dict(commands)
        self._clients = trio.Semaphore(MAX_CLIENTS)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; the socket file goes with us. Raises ConfigError when it can't be made."""
        listener = self._listen()
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                await trio.serve_listeners(self._serve, [listener], handler_nursery=nursery)
        finally:
            self._path.unlink(missing_ok=True)

    def _listen(self) -> trio.SocketListener:
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)  # the data folder's lock is ours: nobody else listens here
            before = os.umask(0o177)
            try:
                raw.bind(os.fspath(self._path))
            finally:
                os.umask(before)
            raw.listen(BACKLOG)
        except OSError as error:
            raw.close()
            raise ConfigError(f"the control socket {self._path} can't be made: {error.strerror or error}") from error
        return trio.SocketListener(trio.socket.from_stdlib_socket(raw))

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with self._clients, stream:
            try:
                try:
                    request = await self._request(stream)
                except Declined as error:
                    await self._send(stream, error_json(error, str(error)))
                else:
                    if request is None:
                        return
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._watch, stream, nursery.cancel_scope)
                        await self._answer(stream, request)
                        nursery.cancel_scope.cancel()
                await self._finish(stream)
            except* trio.BrokenResourceError:
                _log.debug("client.left")

    async def _watch(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """A client that goes away (Ctrl-C) cancels what it asked for."""
        while await stream.receive_some(4096):
            pass
        scope.cancel()

    async def _request(self, stream: trio.SocketStream) -> Json | None:
        """The first line as a command that we know; what follows it is ignored. None: the client has left.

        Raises Declined `bad-request`.
        """
        data = bytearray()
        with trio.move_on_after(REQUEST_S) as silence:
            while b"\n" not in data[-READ_BYTES:]:
                piece = await stream.receive_some(READ_BYTES)
                if not piece:
                    return None
                data += piece
                if len(data) > MAX_REQUEST_BYTES:
                    raise BadRequest(f"a request has more than {MAX_REQUEST_BYTES} bytes")
        if silence.cancelled_caught:
            raise BadRequest(f"no whole line came within {REQUEST_S:.0f} s")
        return read_request(data[: data.index(b"\n")], self._commands)

    async def _finish(self, stream: trio.SocketStream) -> None:
        """Let the client hang up first: closing on what it still sends would break its reading of the answer."""
        await stream.send_eof()
        with trio.move_on_after(LINGER_S):
            while await stream.receive_some(READ_BYTES):
                pass

    async def _answer(self, stream: trio.SocketStream, request: Json) -> None:
        try:
            async with aclosing(self._commands[request["do"]](request)) as answers:
                async for answer in answers:
                    await self._send(stream, answer)
        except trio.BrokenResourceError:
            raise
        except MeshError as error:
            await self._send(stream, error_json(error, self._name_peers(str(error))))
            if not isinstance(error, (Declined, TransientError, FatalError)):
                _log.error("command.failed", command=request["do"], reason=str(error))
        except Exception:  # noqa: BLE001 - the border: a bug in a command costs its client, not the node's sessions
            text = f"the command {request['do']} failed because of a bug; the log of the node shows where"
            await self._send(stream, error_json(NodeError(INTERNAL, text), text))
            _log.exception("command.failed", command=request["do"])

    async def _send(self, stream: trio.SocketStream, answer: Json) -> None:
        await stream.send_all(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
