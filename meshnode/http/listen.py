"""Where the node answers HTTP: its socket, bound before anything runs, so that the address is known."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from meshnode.core.errors import ConfigError

BACKLOG: Final = 128
PORTS: Final = 64  # that are tried, one after the other: many nodes run on one machine in tests


@dataclass(frozen=True, slots=True)
class Binding:
    """A listening socket."""

    socket: socket.socket
    url: str
    loopback: bool  # nobody else can reach it


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(listen: str, *, secure: bool = False) -> Binding:
    """Listen at "HOST:PORT", or at the next free port above. Port 0: any free one.

    Args:
      secure: whether TLS is spoken there.

    Raises ConfigError: the address is not of this machine, or no port is free.
    """
    host, _, port_text = listen.rpartition(":")
    host, first = host.strip("[]"), int(port_text)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last: OSError | None = None
    for port in range(first, min(first + PORTS, 65536)) if first else (0,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            with suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            last = error
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            break
        bound = int(listener.getsockname()[1])
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        return Binding(listener, f"http{'s' if secure else ''}://{shown}:{bound}", is_loopback(host))
    reason = "no port was free" if last is None else last.strerror or str(last)
    raise ConfigError(
        f"http.listen is {listen}, where this node can't listen: {reason}. Set another address, or "
        "http.enabled = false."
    )
