"""The command line's side of a node's control socket: blocking, standard library only, so that it starts fast."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshnode.core.errors import FatalError
from meshnode.core.paths import Paths

Json = dict[str, Any]


class NodeError(FatalError):
    """What the node answered instead of what was asked for."""

    exit_code = 6

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class NotRunning(FatalError):
    """No node runs in this data folder."""

    exit_code = 7


def not_running(folder: Path) -> NotRunning:
    """The sentence, with what to do."""
    if not any(Paths(folder).network.glob("*")):
        return NotRunning(
            f"There is no node in {folder} yet. Make a network with `meshnode init`, or enter one with "
            "`meshnode join TICKET`; --data names another folder."
        )
    return NotRunning(f"No node runs in {folder}. Start it with: meshnode start --data {folder}")


def is_running(folder: Path) -> bool:
    """Whether a node answers in this data folder."""
    try:
        _connect(folder, 2.0).close()
    except NotRunning:
        return False
    return True


def ask(folder: Path, request: Json, seconds: float | None = None) -> Iterator[Json]:
    """Send a request to the node of this data folder; its answers one by one.

    Args:
      seconds: longest silence between two answers; None waits for ever.

    Raises:
      NotRunning: nobody listens. NodeError: the node answered with an error, or went away.
    """
    with _connect(folder, seconds) as connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as lines:
            try:
                for line in lines:
                    answer: Json = json.loads(line)
                    if "error" in answer:
                        raise NodeError(answer["error"]["code"], answer["error"]["text"])
                    yield answer
                    if "done" in answer:
                        return
            except TimeoutError:
                raise NodeError("timeout", f"The node in {folder} did not answer within {seconds} s.") from None
            except ConnectionError:
                pass
        raise NodeError("gone", f"The node in {folder} stopped while it was answering.")


def ask_one(folder: Path, request: Json, seconds: float = 10.0) -> Any:
    """The `done` value of a request with a single answer."""
    for answer in ask(folder, request, seconds):
        if "done" in answer:
            return answer["done"]
    raise NodeError("gone", f"The node in {folder} gave no answer.")


def _connect(folder: Path, seconds: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(str(Paths(folder).control_socket))
    except OSError:
        connection.close()
        raise not_running(folder) from None
    return connection
