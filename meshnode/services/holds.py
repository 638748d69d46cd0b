"""Asks peers to keep layers while we leave them, and answers such questions. See protocols/intent/SPEC.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.net.port import Host, Stream
from protocols.errors import RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, short
from protocols.intent.messages import HOLDS, MAX_MESSAGE, PROTOCOL, Answer, Hold

ANSWER_SECONDS: Final = 5.0


class HoldStreams:
    """The question and the answer of /meshnode/intent/1, one stream each."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._answer: Callable[[PeerId, Hold], Answer] | None = None

    def serve(self, answer: Callable[[PeerId, Hold], Answer]) -> None:
        """Answer the questions of members. Call before the host runs."""
        self._answer = answer
        self._host.handle(PROTOCOL, self._handle)

    async def ask(self, peer: PeerId, hold: Hold) -> Answer:
        """Ask one peer. Raises PeerUnreachable (no answer in 5 s), Declined, RemoteProtocolError.

        If cancelled: the peer may have promised; its promise runs out by itself.
        """
        with trio.move_on_after(ANSWER_SECONDS):
            stream = await self._host.open_stream(peer, PROTOCOL)
            try:
                await stream.send_all(pack(HOLDS.encode(hold)))
                answer = HOLDS.decode(await _one_frame(stream))
            finally:
                await stream.aclose()
            if isinstance(answer, Hold):
                raise RemoteProtocolError(f"{short(peer)} answered a question to keep layers with a question")
            return answer
        raise PeerUnreachable(f"{short(peer)} did not answer within {ANSWER_SECONDS:.0f} s", peer=peer)

    async def _handle(self, stream: Stream) -> None:
        with trio.move_on_after(ANSWER_SECONDS) as limit:
            question = HOLDS.decode(await _one_frame(stream))
            if not isinstance(question, Hold) or self._answer is None:
                raise RemoteProtocolError(f"{short(stream.peer)} sent a {type(question).__name__} as a question")
            await stream.send_all(pack(HOLDS.encode(self._answer(stream.peer, question))))
            await stream.send_eof()
        if limit.cancelled_caught:
            raise PeerUnreachable(
                f"{short(stream.peer)} asked nothing within {ANSWER_SECONDS:.0f} s", peer=stream.peer
            )


async def _one_frame(stream: Stream) -> bytes:
    reader = FrameReader(max_header=MAX_MESSAGE, max_body=0)
    while True:
        data = await stream.receive_some()
        if not data:
            raise PeerUnreachable(f"{short(stream.peer)} closed the stream in the middle", peer=stream.peer)
        for frame in reader.feed(data):
            return frame.header
