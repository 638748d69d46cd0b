"""What waits to be written to one peer: our wishes first, then our answers, over one long-lived stream."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

from meshnode.net.port import Stream
from protocols.bitswap.messages import Message, frame_parts
from protocols.bucket import Bucket
from protocols.ids import PeerId

MAX_DEBT_S: Final = 60.0  # that the pieces under way may be ahead of the limit; they are few and small


class Pace:
    """How fast answers are written, all peers together: in pieces, so that each peer sees that something comes."""

    def __init__(self, bytes_s: int) -> None:
        """`bytes_s`: 0 for no limit."""
        self._bytes_s = bytes_s
        self._piece = min(1 << 18, max(1 << 13, bytes_s // 16))
        self._bucket: Bucket | None = None

    async def write(self, stream: Stream, message: Message) -> None:
        """Raises PeerUnreachable. If cancelled: it may be half written."""
        if not self._bytes_s:
            await write(stream, message)
            return
        for part in frame_parts(message):
            view = memoryview(part)
            for first in range(0, len(view), self._piece):
                piece = view[first : first + self._piece]
                await trio.sleep(self._owed_s(len(piece)))
                await stream.send_all(piece)

    def _owed_s(self, size: int) -> float:
        now = trio.current_time()
        if self._bucket is None:
            self._bucket = Bucket(self._bytes_s, self._bytes_s, now)
        return self._bucket.spend(size, now, MAX_DEBT_S)


class Outbox:
    """The messages for one peer and the loop that writes them.

    It is bounded by those who fill it: wishes by the windows of the asking machine, answers by the two that
    the answering machine allows under way.
    """

    def __init__(self, peer: PeerId, pace: Pace) -> None:
        self.peer = peer
        self._pace = pace
        self.sessions: set[int] = set()  # fetches that ask this peer
        self.trouble = ""  # why the last stream could not be opened or broke
        self._wishes: deque[Message] = deque()
        self._answers: deque[tuple[Message, Callable[[bool], None]]] = deque()
        self._wake = trio.Event()
        self._scope: trio.CancelScope | None = None

    @property
    def needed(self) -> bool:
        """Whether a stream should be open: a fetch asks this peer, or something waits."""
        return bool(self.sessions or self._wishes or self._answers)

    def ask(self, message: Message) -> None:
        """Queue wishes. They go before every answer that is not being written yet."""
        self._wishes.append(message)
        self.wake()

    def answer(self, message: Message, sent: Callable[[bool], None]) -> None:
        """Queue an answer; `sent` is called with whether it was written."""
        self._answers.append((message, sent))
        self.wake()

    def wake(self) -> None:
        """Look again: something changed."""
        self._wake.set()

    def drop(self) -> None:
        """Forget the current stream; the loop that keeps it opens a new one if it is needed."""
        if self._scope is not None:
            self._scope.cancel()

    def clear(self) -> None:
        """Forget everything that waits."""
        self._wishes.clear()
        while self._answers:
            self._answers.popleft()[1](False)

    async def wait(self) -> None:
        """Until something is queued or `wake` is called. If cancelled: nothing happened."""
        await self._wake.wait()
        self._wake = trio.Event()

    async def pump(self, stream: Stream, *, idle_s: float) -> None:
        """Write until `drop`, or until nothing was needed for a while.

        Raises PeerUnreachable. If cancelled: a message may be half written; close the stream.
        """
        with trio.CancelScope() as self._scope:
            while True:
                while self._wishes or self._answers:
                    if self._wishes:
                        await write(stream, self._wishes.popleft())
                        continue
                    message, sent = self._answers.popleft()
                    written = False
                    try:
                        await self._pace.write(stream, message)
                        written = True
                    finally:
                        sent(written)
                with trio.move_on_after(idle_s) as idle:
                    await self.wait()
                if idle.cancelled_caught and not self.needed:
                    return


class Outboxes:
    """One for each peer that something is to be written to."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._of: dict[PeerId, Outbox] = {}
        self._made, self._new = trio.open_memory_channel[Outbox](math.inf)

    def of(self, peer: PeerId) -> Outbox:
        """The one of this peer, made when there is none."""
        outbox = self._of.get(peer)
        if outbox is None:
            outbox = self._of[peer] = Outbox(peer, self._pace)
            self._made.send_nowait(outbox)
        return outbox

    def get(self, peer: PeerId) -> Outbox | None:
        """The one of this peer, if there is one."""
        return self._of.get(peer)

    def forget(self, outbox: Outbox) -> None:
        """Nothing is to be written to its peer any more."""
        if self._of.get(outbox.peer) is outbox:
            del self._of[outbox.peer]

    def leave(self, session: int) -> None:
        """A fetch has ended: it needs nobody any more."""
        for outbox in self._of.values():
            outbox.sessions.discard(session)

    async def made(self) -> AsyncIterator[Outbox]:
        """Every one that is made, from the first one on."""
        async for outbox in self._new:
            yield outbox


async def write(stream: Stream, message: Message) -> None:
    """A whole message. Raises PeerUnreachable. If cancelled: it may be half written."""
    for part in frame_parts(message):
        await stream.send_all(part if isinstance(part, bytes) else memoryview(part))
