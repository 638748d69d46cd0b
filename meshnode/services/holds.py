"""The question to keep layers while somebody leaves them, and its answer. See protocols/intent/SPEC.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import trio

from meshnode.core.errors import Declined, PeerUnreachable, TransientError
from meshnode.model.release import ServedRelease
from meshnode.net.port import Host, Stream
from meshnode.policy.guards import Guard
from meshnode.services.port import Rights
from protocols.errors import ProtocolError, RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import PeerId, short
from protocols.intent.messages import HOLD_MS, HOLDS, MAX_MESSAGE_BYTES, PROTOCOL, Answer, Hold, NotHeld
from protocols.membership.messages import FORBIDDEN, SERVE
from protocols.words import layers

ANSWER_S: Final = 5.0


class Keeper(Protocol):
    """Who serves layers."""

    def answer_hold(self, peer: PeerId, hold: Hold) -> Answer:
        """Answer a peer that asks us to keep layers. Raises RemoteProtocolError for a hold without layers."""


class HoldQuestions:
    """Implements `Holds` of services/port.py: one stream for each question."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def keep(self, release: ServedRelease, guards: Sequence[Guard], epoch: int) -> str | None:
        """See port.py."""
        for guard in guards:
            first, last = guard.layers
            hold = Hold(
                manifest=release.cid,
                variant=release.variant_name,
                first=first,
                last=last,
                epoch=epoch,
                hold_ms=HOLD_MS,
                returns=guard.returns,
            )
            try:
                answer = await self.ask(PeerId(guard.peer), hold)
            except (TransientError, Declined, ProtocolError) as error:
                return f"{short(guard.peer)} could not be asked to keep {layers(first, last)}: {error}"
            if isinstance(answer, NotHeld):
                return f"{short(guard.peer)} does not keep {layers(first, last)}: {answer.reason}"
        return None

    async def ask(self, peer: PeerId, hold: Hold) -> Answer:
        """Ask one peer. Raises PeerUnreachable (no answer in 5 s), Declined, RemoteProtocolError.

        If cancelled: the peer may have promised; its promise runs out by itself.
        """
        with trio.move_on_after(ANSWER_S):
            stream = await self._host.open_stream(peer, PROTOCOL)
            try:
                await stream.send_all(pack(HOLDS.encode(hold)))
                answer = HOLDS.decode(await _one_frame(stream))
            finally:
                await stream.aclose()
            if isinstance(answer, Hold):
                raise RemoteProtocolError(f"{short(peer)} answered a question to keep layers with a question")
            return answer
        raise PeerUnreachable(f"{short(peer)} did not answer within {ANSWER_S:.0f} s", peer=peer)


class HoldAnswers:
    """Answers the questions of members."""

    def __init__(self, host: Host, keeper: Keeper, rights: Rights) -> None:
        """Registers the protocol: make it before the host runs."""
        self._keeper = keeper
        self._rights = rights
        host.handle(PROTOCOL, self._handle)

    async def _handle(self, stream: Stream) -> None:
        with trio.move_on_after(ANSWER_S) as limit:
            question = HOLDS.decode(await _one_frame(stream))
            if not isinstance(question, Hold):
                raise RemoteProtocolError(f"{short(stream.peer)} sent a {type(question).__name__} as a question")
            answer: Answer = NotHeld(code=FORBIDDEN, reason="you lack the role serve, so you have no layers to leave")
            if self._rights.may(stream.peer, SERVE, "asks others to keep layers"):
                answer = self._keeper.answer_hold(stream.peer, question)
            await stream.send_all(pack(HOLDS.encode(answer)))
            await stream.send_eof()
        if limit.cancelled_caught:
            raise PeerUnreachable(f"{short(stream.peer)} asked nothing within {ANSWER_S:.0f} s", peer=stream.peer)


async def _one_frame(stream: Stream) -> bytes:
    reader = FrameReader(max_header=MAX_MESSAGE_BYTES, max_body=0)
    while True:
        data = await stream.receive_some()
        if not data:
            raise PeerUnreachable(f"{short(stream.peer)} closed the stream in the middle", peer=stream.peer)
        for frame in reader.feed(data):
            return frame.header
