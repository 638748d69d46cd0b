"""The engine's end of the socket pair: whole frames, blocking."""

from __future__ import annotations

import socket
from collections import deque

from protocols.enginewire.messages import MAX_MESSAGE_BYTES
from protocols.errors import RemoteProtocolError
from protocols.frame import Frame, FrameReader, pack

READ_BYTES = 1 << 18  # more than a decode step; a prompt of 512 rows comes in five reads


class Link:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = FrameReader(max_header=MAX_MESSAGE_BYTES)
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._ready: deque[Frame] = deque()

    def receive(self) -> Frame | None:
        """The next frame, or None when the other side closed between two frames.

        Raises:
          RemoteProtocolError: a length above the limits, or the end in the middle of a frame.
        """
        while not self._ready:
            count = self._sock.recv_into(self._buffer)
            if count == 0:
                if self._reader.pending:
                    raise RemoteProtocolError("the node's side was closed in the middle of a frame")
                return None
            self._ready.extend(self._reader.feed(self._buffer[:count]))
        return self._ready.popleft()

    def send(self, header: bytes, body: bytes | memoryview = b"") -> None:
        """Send one frame. Raises OSError when the other side is gone."""
        self._sock.sendall(pack(header, body))
