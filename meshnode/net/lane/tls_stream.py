"""One TLS 1.3 connection as a `Stream`: half-close, loss and reset are told apart.

trio's SSLStream can't send an end and read on. TLS 1.3 can (RFC 8446, section 6.1: close_notify ends one
direction only), so the records go through memory here. A connection that ends without close_notify was cut off,
by whomever.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.net.port import STALL_S
from protocols.ids import PeerId

SOCKET_BYTES: Final = 1 << 18
WRITE_BYTES: Final = 1 << 18
SMALL_BYTES: Final = 1 << 15
RECORD_BYTES: Final = 1 << 14  # a TLS record holds no more
GOODBYE_S: Final = 1.0
LINGER_S: Final = 10.0

Socket = trio.socket.SocketType


class TlsStream:
    """Made by `handshake`; belongs to one peer once `peer` is set."""

    def __init__(self, sock: Socket, context: ssl.SSLContext, *, server: bool, first: bytes = b"") -> None:
        """`first`: what has been read from the socket already."""
        self.peer = PeerId("")
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._incoming.write(first)
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._drained = b""  # decrypted before our end was sent
        self._ended_here = False
        self._ended_there = False
        self._closed = False
        self.broken = ""
        self.on_end: Callable[[], None] | None = None
        self.linger: Callable[[Callable[[], Awaitable[None]]], None] | None = None

    async def handshake(self) -> None:
        """Raises PeerUnreachable."""
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._push()
                    await self._pull()
                else:
                    await self._push()
                    return
        except ssl.SSLError as error:
            raise self._lost(f"the TLS handshake failed ({error.reason})") from error

    @property
    def certificate(self) -> bytes:
        """The peer's, in DER; b"" when it showed none."""
        return self._tls.getpeercert(binary_form=True) or b""

    async def send_all(self, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            self._check_writable()
            try:
                self._tls.write(view[start : start + WRITE_BYTES])
            except ssl.SSLError as error:
                raise self._lost(f"the TLS connection failed ({error.reason})") from error
            await self._push()
        self._check_writable()

    def _check_writable(self) -> None:
        if self.broken:
            raise PeerUnreachable(self.broken, peer=self.peer)
        if self._ended_here:
            raise PeerUnreachable("this side of the stream is closed", peer=self.peer)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        data = self._decrypted(max_bytes)
        if data:
            await trio.lowlevel.cancel_shielded_checkpoint()  # a full socket must not starve other tasks
        while not data:
            if self._ended_there and not self._closed:
                return b""
            if self.broken or self._closed:
                raise PeerUnreachable(self.broken or "the stream is closed", peer=self.peer)
            await self._pull()
            data = self._decrypted(max_bytes)
        return data

    def _decrypted(self, max_bytes: int) -> bytes:
        """What has arrived, up to `max_bytes`; b"" when that is nothing."""
        if self._drained:
            data, self._drained = self._drained[:max_bytes], self._drained[max_bytes:]
            return data
        pieces: list[bytes] = []
        left = max_bytes
        try:
            while left and not self._ended_there and not self._closed:
                piece = self._tls.read(min(left, RECORD_BYTES))
                if not piece:
                    self._ended_there = True
                    break
                pieces.append(piece)
                left -= len(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended_there = True
        except ssl.SSLError as error:
            self.break_off(f"{self.peer}: the connection was cut off ({error.reason})")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise PeerUnreachable(self.broken, peer=self.peer)
        await self._end_here()

    async def _end_here(self) -> None:
        if self._ended_here:
            return
        self._ended_here = True
        drained, self._drained = self._drained, b""
        while piece := self._decrypted(SOCKET_BYTES):  # OpenSSL would lose what it has not given out yet
            drained += piece
        self._drained = drained
        with suppress(ssl.SSLError):  # it wants the peer's end as well; ours is on its way
            self._tls.unwrap()
        await self._push()

    async def aclose(self) -> None:
        """The end is sent; the socket stays until the peer has read everything (`linger`)."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
            if not self.broken:
                with suppress(PeerUnreachable, OSError):
                    await self._end_here()
                    self._sock.shutdown(socket.SHUT_WR)
        self._closed = True
        if self.broken or self._ended_there or self.linger is None:
            self._close_socket()
        else:
            self.linger(self._drain)

    async def _drain(self) -> None:
        """Closing a socket with unread bytes in it would destroy what the peer has not read yet."""
        with trio.move_on_after(LINGER_S), suppress(OSError, trio.ClosedResourceError):
            while await self._sock.recv(SOCKET_BYTES):
                pass
        self._close_socket()

    async def reset(self) -> None:
        self._closed = True
        self.break_off("the stream was reset")
        await trio.lowlevel.checkpoint()

    def break_off(self, reason: str) -> None:
        """Drop the connection at once: the peer sees a reset."""
        self.broken = self.broken or reason
        with suppress(OSError):  # closed already
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close_socket()

    def _close_socket(self) -> None:
        self._sock.close()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    async def _push(self) -> None:
        """Send what the TLS machine has ready."""
        if not self._outgoing.pending:
            return
        view = memoryview(self._outgoing.read())
        try:
            if len(view) <= SMALL_BYTES:  # it fits at once as a rule: a token must not wait for the event loop
                with suppress(BlockingIOError):
                    view = view[os.write(self._sock.fileno(), view) :]
            while len(view):
                with trio.move_on_after(STALL_S) as scope:
                    view = view[await self._sock.send(view) :]
                if scope.cancelled_caught:
                    raise self._lost(f"{self.peer} took no data for {STALL_S:.0f} s; the stream is broken")
        except (OSError, trio.ClosedResourceError) as error:
            raise self._lost(_reason(self.peer, error)) from error

    async def _pull(self) -> None:
        """Take what the socket has. Nothing is lost when cancelled."""
        try:
            data = await self._sock.recv(SOCKET_BYTES)
        except (OSError, trio.ClosedResourceError) as error:
            raise self._lost(_reason(self.peer, error)) from error
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _lost(self, reason: str) -> PeerUnreachable:
        self.break_off(reason)
        return PeerUnreachable(self.broken, peer=self.peer)


def _reason(peer: PeerId, error: Exception) -> str:
    return f"{peer}: the connection was lost ({getattr(error, 'strerror', None) or error})"
