"""Messages of one protocol over one stream. Here it is decided whose fault it is when that goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Generic, TypeVar

import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.net.port import Host, Lane, Stream
from protocols.codec import Union
from protocols.errors import RemoteProtocolError
from protocols.frame import Frame, FrameReader, pack
from protocols.ids import PeerId, short

M = TypeVar("M")

CLOSE_S: Final = 1.0  # what has been sent has this long to go out


class MessageStream(Generic[M]):
    """One message a frame, without bodies."""

    def __init__(self, stream: Stream, union: Union[M]) -> None:
        self._stream = stream
        self._union = union
        self._reader = FrameReader(max_header=union.limit, max_body=0)
        self._frames = self._reader.feed(b"")

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    async def send(self, *messages: M) -> None:
        """Send messages in one piece. Raises PeerUnreachable, LocalProtocolError (a limit is broken).

        If cancelled: an unknown part was sent; the stream must be closed.
        """
        await self._stream.send_all(b"".join(pack(self._union.encode(message)) for message in messages))

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; reading goes on."""
        await self._stream.send_eof()

    async def receive(self) -> M | None:
        """The next message; None when the peer has ended its side.

        Raises:
          PeerUnreachable: the stream broke, or ended inside a message.
          RemoteProtocolError: what came is no message of this protocol. Nothing after it can be read.

        If cancelled: nothing is lost.
        """
        while True:
            frame = next(self._frames, None)
            if frame is not None:
                return self._message(frame)
            data = await self._stream.receive_some()
            if not data:
                if self._reader.pending:
                    raise PeerUnreachable(f"{short(self.peer)} hung up in the middle of a message", peer=self.peer)
                return None
            self._frames = self._reader.feed(data)

    async def expect(self) -> M:
        """The next message, where the peer may not end yet. Raises what `receive` raises."""
        message = await self.receive()
        if message is None:
            name = self._union.name
            raise PeerUnreachable(f"{short(self.peer)} hung up in the middle of {name}", peer=self.peer)
        return message

    async def reset(self) -> None:
        """Drop the stream at once; the peer sees PeerUnreachable, not a clean end."""
        await self._stream.reset()

    def _message(self, frame: Frame) -> M:
        return self._union.decode(frame.header)


@asynccontextmanager
async def open_messages(
    host: Host, peer: PeerId, protocol: str, union: Union[M], lane: Lane = Lane.CONTROL
) -> AsyncIterator[MessageStream[M]]:
    """A stream of ours, closed at the end; dropped if the peer broke a rule.

    Raises PeerUnreachable, or Declined if the peer does not serve the protocol or does not admit us.
    """
    stream = await host.open_stream(peer, protocol, lane)
    try:
        yield MessageStream(stream, union)
    except RemoteProtocolError:
        await stream.reset()
        raise
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            await stream.aclose()
