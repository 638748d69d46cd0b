"""Frames over a socket of the tokenizer's process, under trio."""

from __future__ import annotations

import socket
from typing import Final

import trio

from meshnode.text import wire
from protocols.frame import Frame, FrameReader

READ_BYTES: Final = 1 << 18


async def send(sock: socket.socket, data: bytes) -> None:
    """Send all. Raises OSError. If cancelled: a part was sent."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def receive(sock: socket.socket, most: int) -> Frame | None:
    """One frame, or None at the end. Raises RemoteProtocolError. If cancelled: a part was read."""
    reader = FrameReader(max_header=wire.MAX_HEADER, max_body=most)
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(READ_BYTES)
        except BlockingIOError:
            continue
        except OSError:
            return None
        if not data:
            return None
        for frame in reader.feed(data):
            return frame
