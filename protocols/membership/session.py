"""One stream of /meshnode/hello/1: bytes in, bytes and facts out. Frames and codec around `HelloMachine`."""

from __future__ import annotations

from typing import Final

from protocols.errors import RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.membership.machine import Effect, Ended, HelloMachine, Ours, Send
from protocols.membership.messages import HELLO, MAX_MESSAGE, Message

MAX_BATCH: Final = 32  # messages of one read; a hello has at most 18


class HelloSession:
    """Feeds a machine from bytes. `Send` effects never come out: their bytes do."""

    def __init__(self, machine: HelloMachine) -> None:
        self.machine = machine
        self._reader = FrameReader(max_header=MAX_MESSAGE, max_body=0)

    def do(self, event: Ours, now: float, wall_ms: int) -> tuple[bytes, tuple[Effect, ...]]:
        """Bytes to send and facts, after one event of ours."""
        return self._split(self.machine.handle(event, now, wall_ms))

    def receive(self, data: bytes, now: float, wall_ms: int) -> tuple[bytes, tuple[Effect, ...]]:
        """Bytes to send and facts, after bytes of the peer; b"" is the end of its side.

        Raises:
          RemoteProtocolError: a frame or message that is wrong or has no place here; what came before it in
            `data` has been taken.
        """
        if not data:
            if self._reader.pending:
                raise RemoteProtocolError(f"the stream ended inside a message ({self._reader.pending} bytes of it)")
            return self._split(self.machine.handle(Ended(), now, wall_ms))
        out = b""
        facts: tuple[Effect, ...] = ()
        for number, frame in enumerate(self._reader.feed(data)):
            if number >= MAX_BATCH:
                raise RemoteProtocolError(f"more than {MAX_BATCH} messages at once on a hello stream")
            more, new = self._split(self.machine.handle(HELLO.decode(frame.header), now, wall_ms))
            out, facts = out + more, (*facts, *new)
        return out, facts

    @staticmethod
    def _split(effects: tuple[Effect, ...]) -> tuple[bytes, tuple[Effect, ...]]:
        out = b"".join(pack_message(effect.message) for effect in effects if isinstance(effect, Send))
        return out, tuple(effect for effect in effects if not isinstance(effect, Send))


def pack_message(message: Message) -> bytes:
    """One message as a frame."""
    return pack(HELLO.encode(message))
