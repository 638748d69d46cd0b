"""Models of a member's own server, offered to the network by name. See protocols/upstream/SPEC.md."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol

import trio

from meshnode.core.errors import Declined, PeerUnreachable, TransientError
from meshnode.core.log import get_logger
from meshnode.net.port import Host, Stream
from meshnode.services.port import Adverts, Notices, Rights
from protocols.codec import encode
from protocols.errors import MeshError, RemoteProtocolError
from protocols.frame import Frame, FrameReader, pack
from protocols.ids import PeerId, short
from protocols.membership.messages import ASK, FORBIDDEN
from protocols.notice.messages import UPSTREAM
from protocols.upstream.messages import (
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    MESSAGES,
    PROTOCOL,
    Ask,
    End,
    Offers,
    Piece,
    Refused,
    read_offers,
)

AT_ONCE: Final = 4  # questions that are passed on; more are refused, for the server queues them without a word
ASK_S: Final = 10.0  # for a question to arrive
SILENCE_S: Final = 330.0  # of the offerer, which waits for its server
PASSED: Final = (  # fields of a question that go to the server
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
)

_log = get_logger("upstream")


class Server(Protocol):
    """A server of the owner's own (`meshnode/upstream/server.py`)."""

    def answer(self, question: dict[str, Any]) -> AsyncGenerator[str | End, None]:
        """Pieces of text, at last an End. Raises Declined, TransientError."""


class UpstreamService:
    """Offers what the owner has named, and asks for what others offer."""

    name = "upstream"

    def __init__(
        self,
        host: Host,
        adverts: Adverts,
        notices: Notices,
        rights: Rights,
        server: Server | None,
        models: Sequence[str],
    ) -> None:
        """Registers the protocol: make it before the host runs.

        Args:
          server: None: the owner has none.
          models: of it, that are offered.
        """
        self._host = host
        self._adverts = adverts
        self._notices = notices
        self._rights = rights
        self._server = server
        self._models = tuple(models) if server is not None else ()
        self._places = trio.CapacityLimiter(AT_ONCE)
        if self._models:
            host.handle(PROTOCOL, self._handle)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Say what is offered, or that nothing is any more."""
        content = encode(Offers(models=self._models)) if self._models else b""
        if content != self._notices.all(UPSTREAM).get(self._host.peer_id, b""):
            try:
                self._notices.give(UPSTREAM, content)
            except Declined as error:
                _log.warning("upstream.not_offered", reason=str(error))
        task_status.started()
        await trio.sleep_forever()

    def offers(self) -> Mapping[str, Sequence[PeerId]]:
        """Who offers which model, of those who are there: ourselves first."""
        live, found = self._adverts.live(), dict[str, list[PeerId]]()
        for peer, content in self._notices.all(UPSTREAM).items():
            if peer not in live or not content:
                continue
            try:
                models = read_offers(content).models
            except RemoteProtocolError as error:
                _log.warning("offers.refused", peer=short(peer), reason=str(error))
                continue
            for model in models:
                found.setdefault(model, []).append(peer)
        us = self._host.peer_id
        return {model: sorted(peers, key=lambda peer: (peer != us, peer)) for model, peers in sorted(found.items())}

    async def ask(self, model: str, question: dict[str, Any]) -> AsyncGenerator[PeerId | str | End, None]:
        """Who answers, the pieces of its answer, at last an End. Whoever can't begin is passed over for the next one.

        Raises Declined, PeerUnreachable, TransientError.
        """
        self._rights.demand(self._host.peer_id, ASK, "ask questions")
        failed: MeshError | None = None
        for peer in self.offers().get(model, ()):
            begun = False
            own = peer == self._host.peer_id
            source = self._own(model, question) if own else self._asked(peer, model, question)
            try:
                async with aclosing(source) as events:
                    async for event in events:
                        if not begun:
                            begun = True
                            yield peer
                        yield event
                return
            except (Declined, TransientError) as error:
                if begun or (isinstance(error, Declined) and error.code in ("bad-request", FORBIDDEN)):
                    raise
                failed = error
        if failed is not None:
            raise failed
        raise Declined("no-model", f"nobody who is there offers the model {model[:80]!r} any more")

    # ------------------------------------------------------------ answering

    async def _own(self, model: str, question: dict[str, Any]) -> AsyncGenerator[str | End, None]:
        """Our own server's answer. Raises Declined, TransientError."""
        if self._server is None or model not in self._models:
            raise Declined("no-model", f"this node offers no model {model[:80]!r}")
        me = object()
        try:
            self._places.acquire_on_behalf_of_nowait(me)
        except trio.WouldBlock:
            raise Declined(
                "busy", f"the server of {short(self._host.peer_id)} answers {AT_ONCE} questions", retry_ms=2000
            ) from None
        try:
            passed = {name: question[name] for name in PASSED if question.get(name) is not None}
            async with aclosing(self._server.answer({**passed, "model": model})) as events:
                async for event in events:
                    yield event
        finally:
            self._places.release_on_behalf_of(me)

    async def _handle(self, stream: Stream) -> None:
        with trio.fail_after(ASK_S):
            frame = await _frame(stream, FrameReader(max_header=MAX_MESSAGE_BYTES, max_body=MAX_BODY_BYTES))
        asked = MESSAGES.decode(frame.header)
        if not isinstance(asked, Ask):
            raise RemoteProtocolError(f"{short(stream.peer)} began with no question")
        try:
            question = json.loads(frame.body)
        except (ValueError, RecursionError):
            question = None
        if not isinstance(question, dict):
            raise RemoteProtocolError(f"{short(stream.peer)} asked with what is no JSON object")
        if not self._rights.may(stream.peer, ASK, "asks questions"):
            await _send(stream, Refused(code=FORBIDDEN, reason="you lack the role ask"))
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, stream, nursery.cancel_scope)
            await self._pass_on(stream, asked.model, question)
            nursery.cancel_scope.cancel()

    async def _pass_on(self, stream: Stream, model: str, question: dict[str, Any]) -> None:
        try:
            async with aclosing(self._own(model, question)) as events:
                async for event in events:
                    if isinstance(event, End):
                        await _send(stream, event)
                    else:
                        await stream.send_all(pack(MESSAGES.encode(Piece()), event.encode("utf-8", "replace")))
        except Declined as error:
            await _send(stream, Refused(code=error.code[:32], reason=str(error)[:500]))
        except PeerUnreachable:
            raise
        except TransientError as error:
            await _send(stream, Refused(code="upstream-failed", reason=str(error)[:500]))

    # ------------------------------------------------------------ asking

    async def _asked(self, peer: PeerId, model: str, question: dict[str, Any]) -> AsyncGenerator[str | End, None]:
        body = json.dumps(question).encode()
        if len(body) > MAX_BODY_BYTES:
            raise Declined("too-long", f"the question has {len(body)} bytes; {MAX_BODY_BYTES} are passed on at most")
        stream = await self._host.open_stream(peer, PROTOCOL)
        try:
            await stream.send_all(pack(MESSAGES.encode(Ask(model=model)), body))
            reader = FrameReader(max_header=MAX_MESSAGE_BYTES, max_body=MAX_BODY_BYTES)
            while True:
                with trio.move_on_after(SILENCE_S) as silence:
                    frame = await _frame(stream, reader)
                if silence.cancelled_caught:
                    raise PeerUnreachable(f"{short(peer)} said nothing for {SILENCE_S:.0f} s", peer=peer)
                match MESSAGES.decode(frame.header):
                    case Piece():
                        yield _text(frame, peer)
                    case End() as end:
                        yield end
                        return
                    case Refused(code=code, reason=reason):
                        raise Declined(code, f"{short(peer)} says: {reason}", peer=peer)
                    case _:
                        raise RemoteProtocolError(f"{short(peer)} answered a question with a question")
        finally:
            await stream.reset()


async def _frame(stream: Stream, reader: FrameReader) -> Frame:
    for frame in reader.feed(b""):
        return frame
    while True:
        data = await stream.receive_some()
        if not data:
            raise PeerUnreachable(f"{short(stream.peer)} closed the stream in the middle", peer=stream.peer)
        for frame in reader.feed(data):
            return frame


async def _send(stream: Stream, message: End | Refused) -> None:
    await stream.send_all(pack(MESSAGES.encode(message)))
    await stream.send_eof()


async def _watch(stream: Stream, scope: trio.CancelScope) -> None:
    """Whoever goes away ends its question."""
    try:
        while await stream.receive_some():
            pass
    except PeerUnreachable:
        pass
    scope.cancel()


def _text(frame: Frame, peer: PeerId) -> str:
    try:
        text = frame.body.decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise RemoteProtocolError(f"{short(peer)} sent a piece that is no text")
    return text
