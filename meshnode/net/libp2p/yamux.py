"""Yamux: many streams over one secured connection (github.com/hashicorp/yamux/blob/master/spec.md).

Written anew because the library's multiplexer lets a peer push past its window without limit, breaks a stream
whose reader pauses five seconds, and shows a reset or a lost connection as a clean end. What is promised here:

- no peer makes us hold more than `MEMBER_STREAMS` windows; whoever sends past a window loses the connection;
- a writer waits for its reader up to `STALL_S`;
- a clean end is a FIN, everything else is PeerUnreachable; bytes that arrived before a loss are still read;
- the reading task never writes, so two full sockets can't block each other for ever;
- a peer that sends more frames than its allowance (connection_limits.py) is read more slowly.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Final, Protocol

import trio
from trio.lowlevel import ParkingLot

from meshnode.core.errors import PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.connection_limits import (
    FRAME_BURST,
    FRAMES_PER_S,
    MEMBER_STREAMS,
    SLOW_S,
    SLOWED_STREAMS,
    STILL_SLOW_S,
    STREAM_FRAMES,
    WASTE_BYTES,
)
from meshnode.net.port import STALL_S
from protocols.bucket import Bucket
from protocols.ids import PeerId

WINDOW_BYTES: Final = 1 << 18  # what a new stream may send unasked (spec, "Flow Control")
BULK_WINDOW_BYTES: Final = 1 << 20  # credit of a stream that has proven to be read
BULK_BYTES: Final = 1 << 21  # bytes read before a stream gets it
RECORD_BYTES: Final = 65519  # plaintext of one Noise message; a larger frame would cost two
_log = get_logger("net")

MAX_CONTROL_FRAMES: Final = 4096  # answers waiting for a peer that does not read them
LINGER_S: Final = 30.0  # a closed stream whose peer never closes is forgotten after that
GOODBYE_S: Final = 1.0

_HEADER: Final = struct.Struct("!BBHII")  # version, type, flags, stream id, length
_BODY_BYTES: Final = RECORD_BYTES - _HEADER.size


class FrameType(IntEnum):
    DATA = 0
    WINDOW_UPDATE = 1
    PING = 2
    GO_AWAY = 3


class Flag(IntFlag):
    NONE = 0
    SYN = 1
    ACK = 2
    FIN = 4
    RST = 8


_DATA: Final = int(FrameType.DATA)
_WINDOW_UPDATE: Final = int(FrameType.WINDOW_UPDATE)
_SYN: Final = int(Flag.SYN)
_ENDS: Final = int(Flag.FIN | Flag.RST)


class Wire(Protocol):
    """A secured connection. Any exception means that it is gone."""

    async def read(self) -> bytes:
        """One record; b"" at the end."""

    async def write(self, data: bytes) -> None: ...

    async def close_write(self) -> None: ...

    async def close(self) -> None: ...


class YamuxError(Exception):
    """The peer broke a rule; its connection ends. The text says which."""


class YamuxStream:
    """One stream; the `Stream` of the port."""

    def __init__(self, session: YamuxSession, number: int, *, opened_here: bool) -> None:
        self.peer = session.peer
        self.session = session
        self.number = number
        self.opened_here = opened_here
        self._flags = _SYN if opened_here else 0  # what the next frame carries
        self._credit = WINDOW_BYTES  # what we may still send
        self._window = WINDOW_BYTES  # what the peer may still send
        self._window_limit = WINDOW_BYTES
        self._unread = bytearray()
        self._taken = 0  # read by the application, not yet given back as credit
        self._received = 0
        self._readable = ParkingLot()
        self._writable = ParkingLot()
        self.ended_here = False
        self.ended_there = False
        self.closed = False  # nobody will read any more
        self.broken = ""

    async def send_all(self, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        left = memoryview(data)
        while len(left):
            if not self._credit:
                await self._wait_for_credit()
            self._check_writable()
            size = min(len(left), self._credit, _BODY_BYTES)
            self._credit -= size
            await self.session.write_data(self, left[:size])
            left = left[size:]
        self._check_writable()

    async def _wait_for_credit(self) -> None:
        with trio.move_on_after(STALL_S) as scope:
            while not self._credit and not self.broken and not self.ended_here:
                await self._writable.park()
        if scope.cancelled_caught:
            self.session.reset(self)
            self.break_off(f"{self.peer} took no data for {STALL_S:.0f} s; the stream is broken")

    def _check_writable(self) -> None:
        if self.broken:
            raise PeerUnreachable(self.broken, peer=self.peer)
        if self.ended_here:
            raise PeerUnreachable("this side of the stream is closed", peer=self.peer)

    @property
    def unread(self) -> int:
        """Bytes that have come and that nobody has read."""
        return len(self._unread)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._unread:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._unread:
            if self.ended_there and not self.closed:
                return b""
            if self.broken or self.closed:
                raise PeerUnreachable(self.broken or "the stream is closed", peer=self.peer)
            await self._readable.park()
        if len(self._unread) <= max_bytes:
            data = bytes(self._unread)
            self._unread.clear()
        else:
            data = bytes(self._unread[:max_bytes])
            del self._unread[:max_bytes]
        self._give_credit(len(data))
        return data

    def _give_credit(self, size: int) -> None:
        self._taken += size
        self._received += size
        if self._received > BULK_BYTES and self._window_limit < BULK_WINDOW_BYTES:
            self._taken += BULK_WINDOW_BYTES - self._window_limit
            self._window_limit = BULK_WINDOW_BYTES
        if self._taken * 2 >= self._window_limit and not self.ended_there and not self.broken:
            self._window += self._taken
            self.session.send_control(self, FrameType.WINDOW_UPDATE, Flag.NONE, self._taken)
            self._taken = 0

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise PeerUnreachable(self.broken, peer=self.peer)
        self._end_here()

    def _end_here(self) -> None:
        if not self.ended_here and not self.broken:
            self.ended_here = True
            self.session.send_control(self, FrameType.WINDOW_UPDATE, Flag.FIN, 0)
            self._writable.unpark_all()

    async def aclose(self) -> None:
        self._end_here()
        self.closed = True
        self._unread.clear()
        self._readable.unpark_all()
        self.session.forget(self)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.reset_nowait()
        await trio.lowlevel.checkpoint()

    def reset_nowait(self) -> None:
        if not self.broken and not (self.ended_here and self.ended_there):
            self.session.reset(self)
        self.closed = True
        self.break_off("the stream was reset", keep_unread=False)

    # Called by the session

    def take_flags(self) -> int:
        """SYN for the first frame of a stream that we opened."""
        flags, self._flags = self._flags, 0
        return flags

    @property
    def announced(self) -> bool:
        """Whether the peer has heard of this stream."""
        return not self._flags

    def add_credit(self, size: int) -> None:
        self._credit += size
        self._writable.unpark_all()

    def claim_window(self, size: int) -> None:
        """The peer announces a frame. Raises YamuxError when that is more than it may send."""
        self._window -= size
        if self._window < 0:
            raise YamuxError(f"{-self._window} bytes past the window of stream {self.number}")

    def add_bytes(self, data: memoryview) -> None:
        if not self.closed:
            self._unread += data
            self._readable.unpark_all()

    def end_there(self) -> None:
        self.ended_there = True
        self._readable.unpark_all()

    def break_off(self, reason: str, *, keep_unread: bool = True) -> None:
        """No further byte goes either way. What arrived is still read, unless the stream was reset."""
        self.broken = self.broken or reason
        if not keep_unread:
            self._unread.clear()
            self.ended_there = False
        self._readable.unpark_all()
        self._writable.unpark_all()


class YamuxSession:
    """One connection. `run` must be running; `accept` gives the streams that the peer opens."""

    def __init__(self, peer: PeerId, wire: Wire, *, initiator: bool) -> None:
        self.peer = peer
        self.heard_at = trio.current_time()  # when the last bytes came; proof of life
        self.ended = ""  # why, once it is over
        self.over = trio.Event()
        self.max_streams = MEMBER_STREAMS  # that the peer may have open; lower for strangers
        self.stream_frames = STREAM_FRAMES  # that one which it opens counts as
        self.allowance = Bucket(
            FRAMES_PER_S, FRAME_BURST, self.heard_at
        )  # in frames; the host has one for all of a peer
        self.on_slowed: Callable[[], None] = lambda: None  # whenever the peer is read more slowly than it sends
        self._wire = wire
        self._next_number = 1 if initiator else 2
        self._streams: dict[int, YamuxStream] = {}
        self._opened_there = 0
        self._lingering: dict[int, float] = {}
        self._body_stream: YamuxStream | None = None
        self._body_left = 0
        self._body_ends = 0
        self._partial = b""
        self._came = 0.0  # frames since the allowance was last asked
        self._slow_until = 0.0  # few streams at once are taken
        self._control: deque[bytes] = deque()
        self._control_waits = ParkingLot()
        self._write_lock = trio.Lock()
        self._said_goodbye = False
        self._closed = trio.Event()
        self._accept_send, self._accept_receive = trio.open_memory_channel[YamuxStream](MEMBER_STREAMS)

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    async def run(self) -> None:
        """Read and answer until the connection ends, for whatever reason; then `ended` says why. Never raises."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_control)
                nursery.start_soon(self._sweep)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self.end("this host has stopped")
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await self._wire.close()
            self._closed.set()

    def open(self) -> YamuxStream:
        """A new stream; the peer hears of it with the first bytes. Raises PeerUnreachable."""
        if self.ended:
            raise PeerUnreachable(self.ended, peer=self.peer)
        stream = YamuxStream(self, self._next_number, opened_here=True)
        self._next_number += 2
        self._streams[stream.number] = stream
        return stream

    async def accept(self) -> YamuxStream:
        """The next stream that the peer opens. Raises PeerUnreachable at the end of the connection."""
        try:
            return await self._accept_receive.receive()
        except trio.EndOfChannel:
            raise PeerUnreachable(self.ended or "the connection is closed", peer=self.peer) from None

    def end(self, reason: str) -> None:
        """Break every stream. `run` goes on until the wire is closed."""
        if self.ended:
            return
        self.ended = reason
        for stream in list(self._streams.values()):
            stream.break_off(f"{self.peer}: {reason}")
        self._streams.clear()
        self._accept_send.close()
        self.over.set()

    async def close(self, reason: str) -> None:
        """End in good order: what was sent before arrives. Takes `GOODBYE_S` at most."""
        self.end(reason)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
            await self._say_goodbye(0)
            await self._closed.wait()
        await self.kill(reason)

    async def kill(self, reason: str) -> None:
        """End at once; for a peer that does not answer."""
        self.end(reason)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
            await self._wire.close()

    # Writing

    async def write_data(self, stream: YamuxStream, body: memoryview) -> None:
        """One data frame. A frame that was begun is finished even when the caller is cancelled."""
        async with self._write_lock:
            if stream.broken:
                return
            header = _HEADER.pack(0, _DATA, stream.take_flags(), stream.number, len(body))
            await self._write(b"".join((header, body)))

    def send_control(self, stream: YamuxStream, kind: FrameType, flags: Flag, length: int) -> None:
        """Queue a frame without a body; never waits."""
        self._queue(_HEADER.pack(0, kind, flags | stream.take_flags(), stream.number, length))

    def reset(self, stream: YamuxStream) -> None:
        if stream.announced and not self.ended:
            self.send_control(stream, FrameType.WINDOW_UPDATE, Flag.RST, 0)
        self._remove(stream.number)

    def forget(self, stream: YamuxStream) -> None:
        """Nobody reads this stream any more: it goes when the peer has closed its side, or after a while."""
        if stream.ended_there or not stream.announced:
            self._remove(stream.number)
        elif stream.number in self._streams:
            self._lingering[stream.number] = trio.current_time() + LINGER_S

    def _queue(self, frame: bytes) -> None:
        if self.ended:
            return
        if len(self._control) >= MAX_CONTROL_FRAMES:
            self.end(f"it asks faster than it reads ({MAX_CONTROL_FRAMES} answers waiting)")
        self._control.append(frame)
        self._control_waits.unpark_all()

    async def _write_control(self) -> None:
        while True:
            while not self._control:
                await self._control_waits.park()
            async with self._write_lock:
                await self._write(b"")

    async def _write(self, frame: bytes, seconds: float = STALL_S) -> None:
        """Send what is queued and then `frame`. The caller holds the lock."""
        if self._control:
            frame = b"".join((*self._control, frame))
            self._control.clear()
        if not frame:
            return  # another writer has taken the queue along; an empty Noise message would mean the end
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + seconds) as scope:
                await self._wire.write(frame)
        except Exception as error:  # noqa: BLE001 - the border to the library: whatever it is, the wire is gone
            self._lost(error)
        if scope.cancelled_caught:
            await self.kill(f"it took no data for {seconds:.0f} s")

    async def _say_goodbye(self, code: int) -> None:
        """The last frame. The peer closes when it has it; `_read` waits for that."""
        async with self._write_lock:
            if self._said_goodbye or self._closed.is_set():
                return
            self._said_goodbye = True
            self._control.append(_HEADER.pack(0, FrameType.GO_AWAY, 0, 0, code))
            await self._write(b"", GOODBYE_S)
            try:
                await self._wire.close_write()
            except Exception as error:  # noqa: BLE001 - the border to the library: whatever it is, the wire is gone
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        _log.debug("connection.lost", peer=self.peer, reason=_words(error))
        self.end("the connection was lost")

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(LINGER_S / 4)
            for number, due in list(self._lingering.items()):
                if due <= trio.current_time() and number in self._streams:
                    self.reset(self._streams[number])

    # Reading

    async def _read(self) -> None:
        try:
            while data := await self._wire.read():
                self.heard_at = trio.current_time()
                if self.ended:
                    continue  # `close` waits for the peer to close as well
                self._take_record(data)
                if self.over.is_set():
                    return
                await self._slow_down()
        except YamuxError as error:
            self.end(f"it broke the rules of the connection: {error}")
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await self._say_goodbye(1)
        except Exception as error:  # noqa: BLE001 - the border to the library: whatever it is, the wire is gone
            self._lost(error)
        self.end("the peer closed the connection")

    async def _slow_down(self) -> None:
        """Leave what the peer sends beyond its allowance to its own machine for a while."""
        came, self._came = self._came, 0.0
        wait_s = self.allowance.spend(came, trio.current_time(), SLOW_S)
        if wait_s:
            self._slow_until = trio.current_time() + STILL_SLOW_S
            self.on_slowed()
            with trio.move_on_after(wait_s):
                await self.over.wait()

    def _take_record(self, record: bytes) -> None:
        data = memoryview(self._partial + record if self._partial else record)
        offset = 0
        while True:
            if self._body_left:
                piece = data[offset : offset + self._body_left]
                if not piece:
                    break
                offset += len(piece)
                self._body_left -= len(piece)
                if self._body_stream is not None:
                    self._body_stream.add_bytes(piece)
                if self._body_left:
                    break
                self._end_body()
            elif len(data) - offset < _HEADER.size:
                break
            else:
                self._take_header(*_HEADER.unpack_from(data, offset))
                offset += _HEADER.size
                if self.ended:
                    return
        self._partial = bytes(data[offset:])

    def _end_body(self) -> None:
        stream, self._body_stream = self._body_stream, None
        if stream is not None and self._body_ends:
            self._take_ends(stream, self._body_ends)

    def _take_header(self, version: int, kind: int, flags: int, number: int, length: int) -> None:
        self._came += 1.0
        if version:
            raise YamuxError(f"version {version}")
        if kind in (_DATA, _WINDOW_UPDATE):
            stream = self._stream(number, flags)
            if kind == _DATA:
                self._take_data(stream, flags, length)
                return
            if stream is not None:
                stream.add_credit(length)
                self._take_ends(stream, flags)
        elif kind == FrameType.PING:
            if flags & Flag.SYN:
                self._queue(_HEADER.pack(0, FrameType.PING, Flag.ACK, 0, length))
        elif kind == FrameType.GO_AWAY:
            self.end("the peer closed the connection")
        else:
            raise YamuxError(f"a frame of unknown type {kind}")

    def _take_data(self, stream: YamuxStream | None, flags: int, length: int) -> None:
        if stream is not None:
            stream.claim_window(length)
            if stream.closed and length:
                self.reset(stream)  # nobody reads it: tell the writer to stop
                stream = None
        elif length > BULK_WINDOW_BYTES:
            raise YamuxError(f"a frame of {length} bytes")
        if stream is None:
            self._came += length / WASTE_BYTES
        self._body_stream, self._body_left, self._body_ends = stream, length, flags & _ENDS
        if not length:
            self._end_body()

    def _take_ends(self, stream: YamuxStream, flags: int) -> None:
        if flags & Flag.RST:
            self._remove(stream.number)
            stream.break_off("the peer reset the stream", keep_unread=False)
        elif flags & Flag.FIN:
            stream.end_there()
            if stream.ended_here:
                self._remove(stream.number)

    def _stream(self, number: int, flags: int) -> YamuxStream | None:
        """The stream of a frame; None for one that is gone or refused."""
        if not flags & _SYN:
            return self._streams.get(number)
        if number in self._streams or not number or number % 2 == self._next_number % 2:
            raise YamuxError(f"it opened the stream {number}, which it must not")
        self._came += self.stream_frames
        too_many = self._came > SLOWED_STREAMS * self.stream_frames and trio.current_time() < self._slow_until
        if too_many or self._opened_there >= self.max_streams:
            self._queue(_HEADER.pack(0, FrameType.WINDOW_UPDATE, Flag.RST, number, 0))
            return None
        stream = YamuxStream(self, number, opened_here=False)
        self._streams[number] = stream
        self._opened_there += 1
        self._queue(_HEADER.pack(0, FrameType.WINDOW_UPDATE, Flag.ACK, number, 0))
        if not self.ended:
            try:
                self._accept_send.send_nowait(stream)
            except trio.WouldBlock:
                raise YamuxError("it opens and resets streams faster than they are looked at") from None
        return stream

    def _remove(self, number: int) -> None:
        self._lingering.pop(number, None)
        stream = self._streams.pop(number, None)
        if stream is not None and not stream.opened_here:
            self._opened_there -= 1


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
