"""Whether the control socket is ours: other users of this machine may have put theirs where we look for it.

A client gives the node its prompts, and believes its answers. So it looks at the folder of the socket before it
connects (`Paths.check_socket_folder`), and at who listens before it says a word. Standard library only.
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
from pathlib import Path
from typing import Final

from meshnode.core.errors import DiskError
from meshnode.core.paths import Paths

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred of Linux: process, user, group


def check_listener(connection: socket.socket, paths: Paths) -> None:
    """Raise DiskError when a socket that we have connected to belongs to another user.

    The owner of the data folder counts as us: whoever names that folder means its node.
    """
    where = paths.control_socket
    allowed = {os.getuid()}
    try:
        if where.parent == paths.folder:
            allowed.add(paths.folder.stat().st_uid)
        owner = _listener(connection, where)
    except OSError as error:
        raise DiskError(f"who listens at {where} can't be found out: {error.strerror or error}") from error
    if owner not in allowed:
        raise DiskError(
            f"Whoever listens at {where} is {_name(owner)} and not you, so nothing was said to it. Remove that "
            "file, and start your node again."
        )


def _listener(connection: socket.socket, where: Path) -> int:
    """The user who listens: as the kernel says (Linux), else the owner of the socket's file."""
    if hasattr(socket, "SO_PEERCRED"):
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(data)[1])
    return where.lstat().st_uid


def _name(user: int) -> str:
    try:
        return f"the user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"user {user}"
